"""RAM and disk on a virtual clock: what is found where, what comes up before it is asked for, and that nobody looks ahead."""

from __future__ import annotations

import random

import pytest

from pasture.core.storage import BlockKey
from pasture.core.values import Kind
from pasture.foresight.belady import unbounded_hit_ratio
from pasture.foresight.bounds import _stays, foreseeable
from pasture.foresight.hints import Hint, typing_hints
from pasture.foresight.paths import Paths, Reading
from pasture.foresight.policies import POLICIES
from pasture.foresight.replay import TrailMaker, key_of
from pasture.foresight.shelf import Shelf
from pasture.foresight.tier_runs import compare_tiers, tier_lines
from pasture.foresight.traces import TRACE_BLOCK_TOKENS, TraceRequest
from pasture.foresight.two_tiers import Ahead, TwoTiers
from pasture.tiers import prefetch
from tests.unit.foresight.traffic import request, traffic

ONE = TRACE_BLOCK_TOKENS
A, B = list(range(1, 9)), [1, *range(20, 27)]


def two_tiers(ram: int, disk: int, policy: str = "lru", ahead: Ahead = Ahead.OFF) -> TwoTiers:
    return TwoTiers(ram * ONE, disk * ONE, POLICIES[policy], ahead)


def decisions(requests: list[TraceRequest], policy: str, ahead: Ahead) -> list[tuple[int, int, int, tuple[int, ...]]]:
    """After each request: what was found where, what came ahead, and what is in RAM."""
    replay = two_tiers(30, 400, policy, ahead)
    everything = sorted({block for one in requests for block in one.blocks})
    seen = []
    for one in requests:
        tally = replay.play([one])
        there = tuple(block for block in everything if key_of(block) in replay.ram)
        seen.append((tally.ram_tokens, tally.disk_tokens, tally.issued_blocks, there))
    return seen


def test_what_ram_lacks_comes_from_disk_and_what_nobody_has_is_computed() -> None:
    replay = two_tiers(8, 100)
    tally = replay.play([request(0, A), request(1, B), request(2, [*A, 9])])
    assert tally.lifted_blocks == 7, "all of A but the block that B has too"
    assert (tally.ram_tokens, tally.disk_tokens) == ((1 + 1) * ONE, 7 * ONE)
    assert tally.written_blocks == len({*A, *B, 9})
    replay.ram.check()


def test_the_disk_drops_the_ends_of_what_was_used_longest_ago() -> None:
    replay = two_tiers(2, 10)
    replay.play([request(0, A), request(1, [30, 31, 32, 33])])
    assert [block for block in A if key_of(block) in replay.disk] == A[:6]


def test_with_room_for_everything_nothing_is_lost() -> None:
    requests = traffic(80)
    for policy, ahead in tier_lines("foresight")[:-1]:
        tally = two_tiers(20, 10_000, policy, ahead).play(requests)
        assert (tally.ram_tokens + tally.disk_tokens) / tally.prompt_tokens == unbounded_hit_ratio(requests)


def test_paths_foresees_the_rest_of_a_conversation_from_its_first_blocks() -> None:
    requests = [request(0, A), request(1, B), request(2, A), request(3, B), request(4, A)]
    on_demand = two_tiers(8, 100).play(requests)
    ahead = two_tiers(8, 100, ahead=Ahead.PATHS).play(requests)
    assert ahead.lifted_blocks < on_demand.lifted_blocks / 2
    assert ahead.used_blocks + ahead.lifted_blocks == on_demand.lifted_blocks
    assert ahead.precision == 1.0
    assert ahead.ram_tokens + ahead.disk_tokens == on_demand.ram_tokens + on_demand.disk_tokens


def test_returns_come_up_before_the_request_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "RATE_FLOOR", 0.0)
    requests = traffic(300)
    on_demand = two_tiers(60, 10_000, "foresight").play(requests)
    ahead = two_tiers(60, 10_000, "foresight", Ahead.RETURNS).play(requests)
    assert ahead.issued_blocks > 20
    assert ahead.used_blocks > ahead.issued_blocks / 4
    assert ahead.lifted_blocks < on_demand.lifted_blocks


@pytest.mark.parametrize("seconds", [0.5, 5.0])
def test_who_is_typing_finds_a_conversation_in_ram_that_only_the_disk_had(seconds: float) -> None:
    requests = [request(0, A), request(100, [50, 51, 52, 53]), request(200, [*A, 9]), request(300, [50, 51, 52, 53, 54])]
    hints = typing_hints(requests, seconds)
    assert hints == [Hint(200 - seconds, tuple(A[:-1])), Hint(300 - seconds, (50, 51, 52))]
    on_demand = two_tiers(8, 100).play(requests)
    replay = TwoTiers(8 * ONE, 100 * ONE, POLICIES["lru"], Ahead.HINTS, hints)
    ahead = replay.play(requests)
    assert on_demand.lifted_blocks == 4 + 4, "half of A was still there"
    assert ahead.lifted_blocks == 2, "the last block of each, which was short: the next turn has another in its place"
    assert ahead.issued_blocks == ahead.used_blocks == 3 + 3
    assert ahead.precision == 1.0
    replay.ram.check()


def test_a_hint_says_no_more_than_what_the_server_knows_by_then() -> None:
    requests = traffic(300)
    hints = typing_hints(requests, 2.0)
    assert len(hints) > 50
    for hint in hints:
        asked = [one for one in requests if one.at <= hint.at and one.blocks[: len(hint.blocks)] == hint.blocks]
        assert asked
        assert any(hint.at < one.at <= hint.at + 2.0 and one.blocks[: len(hint.blocks)] == hint.blocks for one in requests)


def test_nobody_types_before_the_reply_is_there_and_tools_do_not_type() -> None:
    def turn(at: float, n_blocks: int, finished_at: float, kind: Kind = Kind.CHAT) -> TraceRequest:
        return TraceRequest(at, n_blocks * ONE, tuple(range(n_blocks)), finished_at, kind)

    assert typing_hints([turn(0, 3, 9.0), turn(10, 4, 12.0)], 3.0) == [Hint(9.0, (0, 1))]
    assert typing_hints([turn(0, 3, 10.0), turn(10, 4, 12.0)], 3.0) == []
    assert typing_hints([turn(0, 3, 1.0, Kind.TOOL), turn(10, 4, 12.0)], 3.0) == []
    assert typing_hints([turn(0, 3, 1.0), turn(10, 4, 12.0)], 0.0) == []


def test_one_of_two_branches_is_the_conversation_that_goes_on() -> None:
    branches = [request(0, [1, 2, 3]), request(10, [1, 2, 4]), request(20, [1, 2, 4, 5]), request(30, [1, 2, 3, 6])]
    assert typing_hints(branches, 1.0) == [Hint(9.0, (1, 2)), Hint(19.0, (1, 2))]


@pytest.mark.parametrize(("policy", "ahead"), [line for line in tier_lines("foresight")[:-1] if line[1] is not Ahead.HINTS])
def test_nobody_looks_ahead(policy: str, ahead: Ahead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "RATE_FLOOR", 0.0)
    requests = traffic(160)
    past, future = requests[:100], requests[100:]
    times = [one.at for one in future]
    random.Random(3).shuffle(future)
    shuffled = [TraceRequest(at, one.n_tokens, one.blocks) for at, one in zip(times, future, strict=True)]
    one = decisions(requests, policy, ahead)
    other = decisions([*past, *shuffled], policy, ahead)
    assert one[:100] == other[:100]
    assert one[100:] != other[100:], "the future does differ"
    if ahead is not Ahead.OFF:
        assert one[99][2] > 0, "and something was fetched ahead by then"


def test_a_request_that_is_cut_short_changes_nothing_that_was_foreseen_before() -> None:
    paths = Paths()
    for blocks in (A, A):
        paths.learn([key_of(block) for block in blocks])
    whole, short = Reading(paths), Reading(paths)
    first = [list(whole.asked(key_of(block))) for block in A]
    second = [list(short.asked(key_of(block))) for block in A[:3]]
    assert first[:3] == second
    assert first[0] == [key_of(block) for block in A[1:-1]], "all but the last, which was short"
    assert first[1:] == [[]] * 7


def test_where_requests_part_nothing_is_foreseen_until_one_way_is_the_likely_one() -> None:
    paths = Paths()
    for tail in range(100, 110):
        paths.learn([key_of(block) for block in (1, tail, tail + 100, tail + 200)])
    assert paths.after(key_of(1)) is None
    assert paths.after(key_of(105)) == key_of(205)
    for _ in range(4):
        paths.learn([key_of(block) for block in (1, 105, 205, 305)])
    assert paths.after(key_of(1)) == key_of(105)


def test_what_paths_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pasture.foresight.paths.REMEMBERED_BLOCKS", 10)
    paths = Paths()
    for start in range(0, 1000, 10):
        paths.learn([key_of(block) for block in range(start, start + 5)])
    assert paths.after(key_of(990)) == key_of(991)
    assert paths.after(key_of(0)) is None


def test_a_shelf_is_a_slow_tier() -> None:
    replay = two_tiers(8, 100)
    replay.play([request(0, A)])
    shelf, trail = replay.disk, TrailMaker().trail([*A[:3], 99])
    path = [trail[index] for index in range(4)]
    assert shelf.stored(path) == [True, True, True, False]
    assert [block is not None for block in shelf.get_batch(path, 1.0)] == [True, True, True, False]
    shelf.remove(path[0].key)
    assert path[0].key not in shelf
    assert shelf.following([BlockKey(b"x")]) == [()]
    assert shelf.statistics().blocks == 7
    assert Shelf(1).accepts


def test_what_can_be_foreseen_grows_with_ram_and_is_nothing_where_nobody_returns() -> None:
    requests = traffic(400)
    shares = [foreseeable(requests, blocks * ONE) for blocks in (5, 60, 100_000)]
    assert shares == sorted(shares)
    assert shares[0] < 0.2
    assert shares[-1] == 1.0
    assert foreseeable([request(i, [100 * i + 1, 100 * i + 2]) for i in range(20)], 10 * ONE) == 0.0


def test_the_bound_times_a_wait_from_the_end_of_its_reply_and_knows_what_it_waits_for() -> None:
    turns = [(10.0 * turn, list(range(1, 3 + turn))) for turn in range(30)]
    requests = [TraceRequest(at, len(ids) * ONE, tuple(ids), at + 7.0, Kind.TOOL) for at, ids in turns]
    stays, _ = _stays(requests)
    assert [stay.visit.wait.since for stay in stays] == [at + 7.0 for at, _ in turns]
    assert [stay.until - stay.visit.wait.since for stay in stays[:-1]] == [3.0] * 29
    assert {stay.visit.kind for stay in stays} == {Kind.TOOL}


def test_a_comparison_measures_recall_by_what_lru_lifts() -> None:
    found = compare_tiers(traffic(150), 30 * ONE, 10_000 * ONE, "foresight")
    lru, off, returns, hints, paths, best = found.results
    ways = [Ahead.OFF, Ahead.OFF, Ahead.RETURNS, Ahead.HINTS, Ahead.PATHS, Ahead.OFF]
    assert [result.ahead for result in found.results] == ways
    assert 0 < found.recall(hints) == hints.tally.used_blocks / lru.tally.lifted_blocks
    assert found.recall(lru) == found.recall(off) == 0
    assert found.recall(paths) == paths.tally.used_blocks / lru.tally.lifted_blocks > 0.5
    assert lru.ram_hit_ratio < off.ram_hit_ratio < best.ram_hit_ratio
    assert returns.read_tokens >= ONE * returns.tally.lifted_blocks
