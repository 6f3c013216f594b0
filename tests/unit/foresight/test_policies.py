"""The policies in the RAM tier: each on traffic whose answer is known, and none of them knows the future."""

from __future__ import annotations

import gc
import random

import pytest

from pasture.foresight.belady import belady, unbounded_hit_ratio
from pasture.foresight.policies import POLICIES
from pasture.foresight.replay import Replay, TrailMaker, VirtualClock, key_of
from pasture.foresight.traces import TRACE_BLOCK_TOKENS, TraceRequest
from pasture.tiers.entries import Entry
from pasture.tiers.memory import MemoryTier
from tests.unit.foresight.traffic import request, traffic

ONE = TRACE_BLOCK_TOKENS


def present(replay: Replay, blocks: range | list[int]) -> list[int]:
    return [block for block in blocks if key_of(block) in replay.tier]


def decisions(requests: list[TraceRequest], policy: str, blocks: int) -> list[tuple[int, int, tuple[int, ...]]]:
    """After each request: what was found and stored so far, and which of all blocks are there."""
    replay = Replay(blocks * ONE, POLICIES[policy])
    everything = sorted({block for request in requests for block in request.blocks})
    seen = []
    for one in requests:
        tally = replay.play([one])
        seen.append((tally.hit_tokens, tally.stored_blocks, tuple(present(replay, everything))))
    return seen


def test_lru_drops_the_tail_of_what_was_used_longest_ago() -> None:
    replay = Replay(4 * ONE, POLICIES["lru"])
    replay.play([request(0, [1, 2]), request(1, [3, 4]), request(2, [1, 2]), request(3, [5])])
    assert present(replay, range(1, 6)) == [1, 2, 3, 5]


def test_s3fifo_keeps_what_was_used_twice_from_a_scan() -> None:
    hot = [request(0, [1]), request(1, [1])]
    scan = [request(2 + i, [100 + i]) for i in range(50)]
    s3fifo, lru = Replay(10 * ONE, POLICIES["s3fifo"]), Replay(10 * ONE, POLICIES["lru"])
    s3fifo.play([*hot, *scan])
    lru.play([*hot, *scan])
    assert present(s3fifo, [1]) == [1]
    assert present(lru, [1]) == []


def test_s3fifo_lets_who_left_too_early_into_the_large_queue() -> None:
    replay = Replay(10 * ONE, POLICIES["s3fifo"])
    scan = [request(i, [100 + i]) for i in range(15)]
    replay.play([*scan, request(20, [100]), *[request(30 + i, [200 + i]) for i in range(30)]])
    assert present(replay, [100]) == [100]


def test_foresight_refuses_what_comes_once_and_keeps_who_returns() -> None:
    requests = traffic(600)
    found = {policy: Replay(70 * ONE, POLICIES[policy]).play(requests) for policy in ("lru", "foresight")}
    assert found["foresight"].hit_ratio > 1.5 * found["lru"].hit_ratio
    assert found["foresight"].stored_blocks < found["lru"].stored_blocks / 2


def test_with_room_for_everything_all_policies_find_the_same() -> None:
    requests = traffic(200)
    ratios = {policy: Replay(10_000 * ONE, POLICIES[policy]).play(requests).hit_ratio for policy in POLICIES}
    assert set(ratios.values()) == {unbounded_hit_ratio(requests)}


@pytest.mark.parametrize("blocks", [20, 60, 200])
def test_nobody_beats_belady_and_nothing_beats_no_bounds(blocks: int) -> None:
    requests = traffic(400)
    best = Replay(blocks * ONE, lambda clock: belady(requests)).play(requests).hit_ratio
    for policy in POLICIES.values():
        assert Replay(blocks * ONE, policy).play(requests).hit_ratio <= best <= unbounded_hit_ratio(requests)


def test_belady_on_a_sequence_worked_out_by_hand() -> None:
    requests = [request(at, [block]) for at, block in enumerate([1, 2, 3, 1, 2, 3, 1, 2])]
    tally = Replay(2 * ONE, lambda clock: belady(requests)).play(requests)
    assert tally.hit_tokens == 4 * ONE, "1 and 2 stay, 3 never gets in"
    assert Replay(2 * ONE, POLICIES["lru"]).play(requests).hit_tokens == 0


@pytest.mark.parametrize("policy", list(POLICIES))
def test_no_policy_looks_ahead(policy: str) -> None:
    requests = traffic(300)
    past, future = requests[:150], requests[150:]
    times = [one.at for one in future]
    random.Random(3).shuffle(future)
    shuffled = [TraceRequest(at, one.n_tokens, one.blocks) for at, one in zip(times, future, strict=True)]
    one = decisions(requests, policy, 40)
    other = decisions([*past, *shuffled], policy, 40)
    assert one[:150] == other[:150]
    assert one[150:] != other[150:], "the future does differ"


@pytest.mark.parametrize("policy", list(POLICIES))
def test_the_books_add_up_after_random_traffic(policy: str) -> None:
    replay = Replay(30 * ONE, POLICIES[policy])
    for one in traffic(300, seed=11):
        replay.play([one])
        replay.tier.check()
    assert replay.tier.used_bytes <= replay.tier.budget_bytes


def entries_alive() -> int:
    gc.collect()
    return sum(isinstance(one, Entry) for one in gc.get_objects())


@pytest.mark.parametrize("policy", list(POLICIES))
def test_what_left_before_room_was_needed_is_forgotten(policy: str) -> None:
    before, clock = entries_alive(), VirtualClock()
    tier = MemoryTier(1 << 40, policy=POLICIES[policy](clock))
    for number in range(12_000):
        clock.now += 1.0
        trail = TrailMaker().trail([number])
        tier.insert(trail.blocks[0])
        if number % 100 == 99:
            tier.drop_unused(tier.tick - 10, {})  # as blocks expire where memory is plenty
    assert tier.statistics().blocks == 10
    assert entries_alive() - before < 10_000
    tier.check()


def test_a_prompt_larger_than_the_tier_stays_with_its_head() -> None:
    for policy in POLICIES.values():
        replay = Replay(4 * ONE, policy)
        replay.play([request(0, list(range(1, 10))), request(1, list(range(1, 10)))])
        assert replay.tally.hit_tokens == 4 * ONE
