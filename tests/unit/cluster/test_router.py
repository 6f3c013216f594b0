"""The router's policy, one rule after the other, on a few replicas that say what the test wants."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from pasture.cluster.router import PullSeconds, Router, RouterSettings, never_pull
from pasture.cluster.values import (
    Capacity,
    Decision,
    Delta,
    Epoch,
    Load,
    Placement,
    Pull,
    Reason,
    ReplicaId,
    SessionKey,
    Snapshot,
    SnapshotRequest,
)
from pasture.core.storage import BLOCK_TOKENS, BlockKey
from pasture.core.values import RequestId

A, B, C = ReplicaId("a"), ReplicaId("b"), ReplicaId("c")
ONE, TWO = Epoch(1), Epoch(2)
RATE = 1000.0
SETTINGS = RouterSettings(
    tolerated_ttft_seconds=2.0, ring_tokens=2 * BLOCK_TOKENS, prefix_tokens=4 * BLOCK_TOKENS, work_weight=4.0
)


def quick(n_tokens: int) -> float:
    """Pulling takes a tenth of recomputing."""
    return n_tokens / RATE / 10


def path(name: str, n_blocks: int = 10) -> tuple[BlockKey, ...]:
    return tuple(BlockKey(f"{name}{index}".encode()) for index in range(n_blocks))


def prompt(name: str, n_blocks: int = 10, session: str | None = None, avoid: frozenset[ReplicaId] = frozenset()) -> Placement:
    return Placement(path(name, n_blocks), n_blocks * BLOCK_TOKENS, SessionKey(session) if session else None, avoid)


def router_of(*replicas: ReplicaId, pull_seconds: PullSeconds = never_pull) -> Router:
    router = Router(SETTINGS, pull_seconds)
    for replica in replicas:
        router.join(replica, ONE, Capacity(RATE))
    return router


def placed(router: Router, placement: Placement) -> Decision:
    decision = router.place(placement)
    assert decision is not None
    return decision


def start(router: Router, placement: Placement, number: int = 0) -> Decision:
    decision = placed(router, placement)
    router.started(RequestId(f"r{number}"), placement, decision)
    return decision


def others(router: Router, decision: Decision) -> set[ReplicaId]:
    return set(router.replicas()) - {decision.replica}


def test_nobody_is_there() -> None:
    assert router_of().place(prompt("x")) is None
    assert router_of(A).place(prompt("x", avoid=frozenset({A}))) is None


# Sessions and saturation


def test_a_session_stays_until_its_replica_is_saturated_and_then_is_at_home_where_it_went() -> None:
    router = router_of(A, B)
    home = start(router, prompt("x", session="s"))
    router.finished(RequestId("r0"))
    router.observe(Delta(home.replica, ONE, 1, load=Load(1999)))
    assert placed(router, prompt("y", session="s")).reason == Reason.SESSION
    assert placed(router, prompt("y", session="s")).replica == home.replica
    router.observe(Delta(home.replica, ONE, 2, load=Load(2001)))
    spilled = start(router, prompt("y", session="s"), 1)
    assert spilled.reason == Reason.SPILLED
    assert spilled.replica in others(router, home)
    router.observe(Delta(home.replica, ONE, 3, load=Load(0)))
    router.finished(RequestId("r1"))
    assert placed(router, prompt("y", session="s")).replica == spilled.replica


def test_a_session_waits_at_home_where_it_would_wait_no_less_elsewhere() -> None:
    router = router_of(A, B)
    home = start(router, prompt("x", session="s"))
    for replica in (A, B):
        router.observe(Delta(replica, ONE, 1, load=Load(9000)))
    decision = placed(router, prompt("x", session="s"))
    assert (decision.replica, decision.reason) == (home.replica, Reason.BUSY)


def test_work_done_again_counts_more_than_waiting() -> None:
    router = router_of(A, B)
    long = prompt("x", 100)
    router.observe(Delta(A, ONE, 1, stored=long.path, load=Load(7000)))
    assert placed(router, long).reason == Reason.BUSY, "6.4 s of prefill again, to wait 7 s less"
    router.observe(Delta(A, ONE, 2, load=Load(40_000)))
    assert placed(router, long).reason == Reason.SPILLED


def test_what_is_in_flight_saturates_until_its_first_token() -> None:
    router = router_of(A, B)
    home = start(router, prompt("x", 40, session="s"))
    assert home.uncached_tokens == 2560
    assert placed(router, prompt("y", 40, session="s")).reason == Reason.SPILLED
    router.progress(RequestId("r0"), 0)
    assert placed(router, prompt("y", 40, session="s")).reason == Reason.SESSION


def test_a_bigger_replica_is_saturated_later() -> None:
    router = router_of(A, B)
    home = start(router, prompt("x", session="s")).replica
    router.observe(Delta(home, ONE, 1, load=Load(5000)))
    assert placed(router, prompt("y", session="s")).reason == Reason.SPILLED
    router.join(home, ONE, Capacity(3000.0))
    assert placed(router, prompt("y", session="s")).reason == Reason.SESSION


def test_no_more_sessions_are_remembered_than_asked_for() -> None:
    router = Router(RouterSettings(max_sessions=2))
    router.join(A, ONE, Capacity(RATE))
    for number in range(5):
        start(router, prompt(f"x{number}", session=f"s{number}"), number)
    assert router.statistics().sessions == 2


# Prefixes


def test_a_known_prefix_draws_if_it_is_long_enough() -> None:
    for holder in (A, B, C):
        router = router_of(A, B, C)
        router.observe(Delta(holder, ONE, 1, stored=path("x", 4)))
        decision = placed(router, prompt("x"))
        assert (decision.replica, decision.reason) == (holder, Reason.PREFIX)
        assert (decision.cached_tokens, decision.uncached_tokens) == (4 * BLOCK_TOKENS, 6 * BLOCK_TOKENS)
        router.observe(Delta(holder, ONE, 2, removed=path("x", 4)[-1:]))
        assert placed(router, prompt("x")).reason == Reason.RING


def test_of_those_that_know_a_prefix_the_one_with_less_to_do_gets_it() -> None:
    router = router_of(A, B, C)
    for replica, load in ((A, 1500), (B, 100), (C, 0)):
        router.observe(Delta(replica, ONE, 1, stored=path("x", 8 if replica != C else 5), load=Load(load)))
    assert placed(router, prompt("x")).replica == B


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    router = router_of(A)
    router.observe(Delta(A, ONE, 1, stored=path("x")))
    assert placed(router, prompt("x")).uncached_tokens == 1


def test_a_prompt_follows_one_with_the_same_beginning_that_is_still_being_computed() -> None:
    router = router_of(A, B, C)
    first = start(router, prompt("x", 8))
    router.observe(Delta(first.replica, ONE, 1, load=Load(1800)))
    decision = placed(router, prompt("x", 9))
    assert decision == Decision(first.replica, Reason.PREFIX, cached_tokens=0, uncached_tokens=BLOCK_TOKENS)


def test_what_is_being_computed_is_worth_waiting_for_and_is_not_pulled() -> None:
    router = router_of(A, B, pull_seconds=quick)
    first = start(router, prompt("x", 100))
    decision = placed(router, prompt("x", 100))
    assert (decision.replica, decision.reason, decision.uncached_tokens) == (first.replica, Reason.BUSY, 1)
    elsewhere = placed(router, prompt("x", 100, avoid=frozenset({first.replica})))
    assert (elsewhere.uncached_tokens, elsewhere.pull) == (6400, None)


def test_a_prompt_goes_where_its_beginning_went_though_nobody_has_it_any_more() -> None:
    router = router_of(A, B, C)
    hot = [placed(router, prompt("x")).replica]
    router.observe(Delta(hot[0], ONE, 1, load=Load(1900)))
    first = start(router, prompt("x", 8))
    assert first.replica != hot[0], "the load bound"
    router.finished(RequestId("r0"))
    router.observe(Delta(hot[0], ONE, 2, load=Load(0)))
    decision = placed(router, prompt("x", 9))
    assert decision == Decision(first.replica, Reason.HEAD, cached_tokens=0, uncached_tokens=9 * BLOCK_TOKENS)


# The ring


def test_the_same_beginning_goes_to_the_same_replica_whoever_decides() -> None:
    one, other = router_of(A, B, C), router_of(C, A, B)
    for number in range(50):
        placement = Placement((BlockKey(b"x0"), BlockKey(f"{number}".encode()), BlockKey(b"?")), 192)
        longer = Placement((*placement.path[:2], BlockKey(b"!"), BlockKey(b"!!")), 256)
        assert placed(one, placement).reason == Reason.RING
        assert placed(one, placement).replica == placed(other, longer).replica


def test_one_hot_beginning_is_spread_within_the_bound() -> None:
    router = router_of(A, B, C)
    counts: Counter[ReplicaId] = Counter()
    for number in range(90):
        placement = Placement((BlockKey(b"hot"),), BLOCK_TOKENS)
        decision = placed(router, placement)
        counts[decision.replica] += 1
        router.observe(
            Delta(decision.replica, ONE, counts[decision.replica], load=Load(BLOCK_TOKENS * counts[decision.replica]))
        )
        assert max(counts.values()) <= 1.25 * (number + 1) / 3 + 1
    assert len(counts) == 3


def test_a_prompt_without_blocks_goes_where_it_begins_soonest() -> None:
    router = router_of(A, B)
    router.observe(Delta(A, ONE, 1, load=Load(500)))
    assert placed(router, Placement((), 0)).replica == B


@settings(max_examples=15, deadline=None)
@given(n=st.integers(2, 12), left=st.integers(0, 11))
def test_when_a_replica_leaves_or_joins_only_its_own_conversations_move(n: int, left: int) -> None:
    names = [ReplicaId(f"replica {number}") for number in range(n)]
    router = router_of(*names)
    keys = [Placement((BlockKey(f"k{number}".encode()),), BLOCK_TOKENS) for number in range(120)]
    before = [placed(router, key).replica for key in keys]
    gone = names[left % n]
    router.leave(gone)
    after = [placed(router, key).replica for key in keys]
    assert [a for a, b in zip(after, before, strict=True) if b != gone] == [b for b in before if b != gone]
    assert gone not in after
    assert before.count(gone) <= 1.5 * len(keys) / n + 12
    router.join(gone, TWO, Capacity(RATE))
    assert [placed(router, key).replica for key in keys] == before


# Pulling


def test_a_spilled_session_pulls_from_who_has_its_blocks_when_that_pays() -> None:
    router = router_of(A, B, pull_seconds=quick)
    router.observe(Delta(A, ONE, 1, stored=path("x", 8), load=Load(6000)))
    router.observe(Delta(B, ONE, 1, stored=path("x", 3)))
    decision = placed(router, prompt("x"))
    assert decision == Decision(B, Reason.SPILLED, 3 * BLOCK_TOKENS, 2 * BLOCK_TOKENS, Pull(A, 3, 8))


def test_nothing_is_pulled_where_recomputing_wins() -> None:
    router = router_of(A, B)
    router.observe(Delta(A, ONE, 1, stored=path("x", 8), load=Load(20_000)))
    decision = placed(router, prompt("x"))
    assert decision == Decision(B, Reason.SPILLED, 0, 10 * BLOCK_TOKENS)


def test_a_pool_is_pulled_from_and_never_placed_at() -> None:
    router = router_of(A, B, pull_seconds=quick)
    pool = ReplicaId("pool")
    router.attach(pool, ONE)
    router.observe(Delta(pool, ONE, 1, stored=path("x", 9)))
    decision = placed(router, prompt("x"))
    assert decision.replica in (A, B)
    assert decision.pull == Pull(pool, 0, 9)
    assert router.replicas() == [A, B]
    assert router.place(prompt("x", avoid=frozenset({A, B}))) is None


def test_a_draining_replica_gets_nothing_and_is_pulled_from() -> None:
    router = router_of(A, B, pull_seconds=quick)
    router.observe(Delta(A, ONE, 1, stored=path("x")))
    start(router, prompt("x", session="s"))
    router.drain(A)
    assert router.replicas() == [B]
    decision = placed(router, prompt("x", session="s"))
    assert (decision.replica, decision.pull, decision.uncached_tokens) == (B, Pull(A, 0, 10), 1)
    router.leave(A)
    assert placed(router, prompt("x", session="s")).pull is None


# Lives


def test_a_restarted_replica_is_credited_with_nothing() -> None:
    router = router_of(A, B, pull_seconds=quick)
    router.observe(Delta(A, ONE, 1, stored=path("x"), load=Load(500)))
    assert start(router, prompt("x", session="s")).replica == A
    router.join(A, TWO, Capacity(RATE))
    decision = placed(router, prompt("x", session="s"))
    assert decision.reason == Reason.RING
    assert (decision.cached_tokens, decision.pull) == (0, None)
    assert set(router.statistics().uncached_tokens.values()) == {0}
    router.observe(Delta(A, ONE, 2, stored=path("x"), load=Load(5000)))
    router.join(A, ONE, Capacity(RATE))
    assert placed(router, prompt("x", session="s")) == decision


def test_an_event_of_a_new_epoch_is_a_restart_too() -> None:
    router = router_of(A, B)
    router.observe(Delta(A, ONE, 1, stored=path("x")))
    router.observe(Delta(A, TWO, 1, stored=path("x", 5)))
    assert placed(router, prompt("x")).cached_tokens == 5 * BLOCK_TOKENS


def test_a_gap_asks_for_a_snapshot_and_credits_nothing_until_it_comes() -> None:
    router = router_of(A, B)
    router.observe(Delta(A, ONE, 1, stored=path("x")))
    assert router.observe(Delta(A, ONE, 3, stored=path("y"))) == SnapshotRequest(A, ONE)
    assert {placed(router, prompt(name)).cached_tokens for name in "xy"} == {0}
    router.observe(Snapshot(A, ONE, 3, path("y")))
    assert placed(router, prompt("y")).replica == A
    assert router.statistics().gaps == 1


def test_strangers_are_not_listened_to() -> None:
    router = router_of(A)
    assert router.observe(Delta(B, ONE, 7, stored=path("x"))) is None
    router.leave(A)
    router.leave(A)
    router.observe(Delta(A, ONE, 1, stored=path("x")))
    assert router.statistics().known_blocks == 0


def test_a_request_that_starts_where_nobody_is_any_more_counts_nowhere() -> None:
    router = router_of(A, B)
    decision = placed(router, prompt("x", session="s"))
    router.leave(decision.replica)
    router.started(RequestId("r"), prompt("x", session="s"), decision)
    router.join(decision.replica, TWO, Capacity(RATE))
    assert set(router.statistics().uncached_tokens.values()) == {0}


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(("place", "finish", "leave", "join", "restart", "drain", "store", "lost", "snapshot")),
        st.sampled_from((A, B, C)),
        st.integers(0, 5),
    ),
    max_size=40,
)


@given(_STEPS)
def test_whatever_happens_decisions_name_the_living_and_credit_what_they_hold(steps: list[tuple[str, ReplicaId, int]]) -> None:
    router, epochs, numbers, held = (
        Router(SETTINGS, quick),
        Counter[ReplicaId](),
        Counter[ReplicaId](),
        dict[ReplicaId, set[BlockKey]](),
    )
    alive: set[ReplicaId] = set()
    draining: set[ReplicaId] = set()
    for step, (what, who, n) in enumerate(steps):
        if what in ("join", "restart") and (what == "restart" or who not in alive):
            epochs[who] += 1
            numbers[who], held[who] = 0, set()
            router.join(who, Epoch(epochs[who]), Capacity(RATE))
            alive.add(who)
            draining.discard(who)
        elif what == "leave":
            router.leave(who)
            alive.discard(who)
            draining.discard(who)
        elif what == "drain" and who in alive:
            router.drain(who)
            draining.add(who)
        elif what in ("store", "lost", "snapshot") and who in alive:
            numbers[who] += what != "snapshot"
            gone = path("x", 6)[n:] if what == "store" else ()
            held[who] = (held[who] | set(path("x", n))) - set(gone) if what != "snapshot" else held[who]
            if what == "snapshot":
                router.observe(Snapshot(who, Epoch(epochs[who]), numbers[who], tuple(held[who])))
            elif what == "store":
                router.observe(Delta(who, Epoch(epochs[who]), numbers[who], path("x", n), gone))
        elif what == "finish":
            router.finished(RequestId(f"r{n}"))
        placement = prompt("x", 6, session=f"s{n}")
        decision = router.place(placement)
        assert (decision is None) == (not alive - draining)
        if decision is not None:
            assert decision.replica in alive - draining
            credited = decision.cached_tokens // BLOCK_TOKENS
            assert set(placement.path[:credited]) <= held[decision.replica] or what == "lost"
            if decision.pull is not None:
                assert decision.pull.owner in alive
                assert decision.pull.owner != decision.replica
            if what == "place":
                router.started(RequestId(f"r{step % 6}"), placement, decision)
    for number in range(6):
        router.finished(RequestId(f"r{number}"))
    assert set(router.statistics().uncached_tokens.values()) <= {0}
