"""Simulated nodes: times that can be worked out by hand, the same finds as a single tier, and nothing lost or counted twice."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pasture.core.storage import BlockKey
from pasture.foresight.nodes import Choice, Job, LoadModel, Node
from pasture.foresight.nodes_replay import FleetReplay, FleetTally, max_over_mean
from pasture.foresight.policies import POLICIES
from pasture.foresight.replay import Replay
from pasture.foresight.traces import TRACE_BLOCK_TOKENS, TraceRequest
from tests.unit.foresight.traffic import traffic

MODEL = LoadModel(
    prefill_tokens_per_second=512.0,
    token_seconds=0.5,
    full_streams=4,
    kv_bytes_per_token=100,
    link_bytes_per_second=512_000.0,
    link_seconds=0.25,
)
"""a block a second; each stream takes a quarter; a block moves in 0.1 s behind 0.25 s"""


class Script:
    """Choices in order, and everything it is told."""

    def __init__(self, *choices: Choice) -> None:
        self._choices = list(choices)
        self.held: dict[int, set[BlockKey]] = {}
        self.running: set[int] = set()
        self.most_running = 0
        self.story: list[tuple[str, int]] = []

    def place(self, job: Job, nodes: Sequence[Node]) -> Choice:
        return self._choices[job.number % len(self._choices)]

    def placed(self, job: Job, choice: Choice) -> None:
        self.story.append(("placed", job.number))
        self.running.add(job.number)
        self.most_running = max(self.most_running, len(self.running))

    def prefilled(self, job: Job) -> None:
        self.story.append(("prefilled", job.number))

    def finished(self, job: Job) -> None:
        self.story.append(("finished", job.number))
        self.running.remove(job.number)

    def changed(self, node: int, stored: Sequence[BlockKey], removed: Sequence[BlockKey]) -> None:
        held = self.held.setdefault(node, set())
        assert not held & set(stored) - set(removed), "stored twice"
        held |= set(stored)
        assert set(removed) <= held
        held -= set(removed)


def request(at: float, blocks: Sequence[int], reply: int = 0) -> TraceRequest:
    return TraceRequest(at, len(blocks) * TRACE_BLOCK_TOKENS, tuple(blocks), n_reply_tokens=reply)


def play(
    requests: Sequence[TraceRequest], rule: Script, n_nodes: int = 2, capacity: int = 100_000, in_flight: int | None = None
) -> FleetTally:
    return FleetReplay(n_nodes, capacity, POLICIES["lru"], rule, MODEL).play(requests, in_flight)


def test_prompts_wait_for_each_other_and_share_the_node_with_streams() -> None:
    rule = Script(Choice(0))
    tally = play([request(0, [1, 2, 3], reply=10), request(1, [4, 5, 6])], rule)
    assert tally.first_token_seconds == [3.0, 2.0 + 3 / 0.75]
    assert rule.story == [
        ("placed", 0),
        ("placed", 1),
        ("prefilled", 0),
        ("prefilled", 1),
        ("finished", 1),
        ("finished", 0),
    ]
    assert tally.ended_at == 3.0 + 5.0


def test_a_prefix_is_found_where_it_was_computed_and_nowhere_else() -> None:
    again = [request(0, [1, 2]), request(10, [1, 2, 3])]
    here, there = play(again, Script(Choice(0))), play(again, Script(Choice(0), Choice(1)))
    assert (here.local_tokens, here.first_token_seconds[1]) == (1024, 1.0)
    assert (there.local_tokens, there.first_token_seconds[1]) == (0, 3.0)


def test_what_is_pulled_takes_the_link_and_is_not_computed() -> None:
    rule = Script(Choice(0), Choice(1, pull_from=0), Choice(1))
    tally = play([request(0, [1, 2]), request(10, [1, 2, 3]), request(20, [1, 2, 3])], rule)
    assert (tally.local_tokens, tally.pulled_tokens, tally.moved_bytes) == (3 * 512, 2 * 512, 2 * 512 * 100)
    assert tally.first_token_seconds == pytest.approx([2.0, 0.25 + 0.2 + 1.0, 0.0])
    assert tally.hit_ratio == pytest.approx(5 / 8)
    assert tally.local_hit_ratio == pytest.approx(3 / 8)


def test_what_the_owner_has_lost_is_computed() -> None:
    rule = Script(Choice(0), Choice(0), Choice(1, pull_from=0))
    tally = play([request(0, [1, 2]), request(10, [3, 4]), request(20, [1, 2])], rule, capacity=2 * 2 * TRACE_BLOCK_TOKENS)
    assert tally.moved_bytes == 0
    assert tally.first_token_seconds[2] == 2.0


def test_a_rule_is_told_what_each_node_holds() -> None:
    rule = Script(Choice(0), Choice(1))
    replay = FleetReplay(2, 20 * TRACE_BLOCK_TOKENS, POLICIES["foresight"], rule, MODEL)
    replay.play(traffic(200))
    for node in replay.nodes:
        assert node.tier.statistics().evicted_blocks > 0
        assert len(rule.held[node.number]) == node.tier.statistics().blocks
        assert all(key in node.tier for key in rule.held[node.number])
        assert (node.uncached_tokens, node.n_requests, node.active_blocks, node.n_streams) == (0, 0, 0, 0)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_one_idle_node_finds_what_the_single_tier_finds(policy: str) -> None:
    requests = [TraceRequest(r.at * 100, r.n_tokens, r.blocks) for r in traffic(200)]
    quick = LoadModel(prefill_tokens_per_second=1e9)
    tally = FleetReplay(1, 40_000, POLICIES[policy], Script(Choice(0)), quick).play(requests)
    assert tally.local_tokens == Replay(40_000, POLICIES[policy]).play(requests).hit_tokens


def test_so_many_are_kept_in_flight_and_all_are_served_in_order() -> None:
    rule = Script(Choice(0), Choice(1))
    requests = [request(0, [number], reply=1 + number % 3) for number in range(40)]
    tally = play(requests, rule, in_flight=3)
    assert rule.most_running == 6
    assert [number for what, number in rule.story if what == "placed"] == list(range(40))
    seconds, ended = tally.steady
    assert (tally.ended, ended) == (40, 40 - 6), "the last one came when the one before the last six had ended"
    assert tally.requests_per_second == pytest.approx(34 / seconds)


def test_load_is_the_work_a_node_got() -> None:
    tally = play([request(0, [1, 2, 3], reply=8), request(400, [4])], Script(Choice(0), Choice(1)))
    assert tally.loads() == [3 + 8 * 0.5 / 4, 1.0]
    assert tally.max_over_mean == pytest.approx(4 / 2.5)
    assert tally.window_max_over_mean == 2.0, "in each window one node did it all"
    assert max_over_mean([0.0, 0.0]) == 1.0


def test_pulling_pays_where_the_link_beats_the_node() -> None:
    assert MODEL.pull_seconds(512) == pytest.approx(0.35)
    assert MODEL.pull_seconds(128) is None, "0.25 s of prefill, 0.275 s of moving"
