"""The router in simulation: it is told what a cluster would tell it, and every rule serves the same requests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pasture.cluster.simulated import OURS, RULES, FleetComparison, Routed, compare, taken_by_another
from pasture.cluster.values import Reason
from pasture.foresight.belady import unbounded_hit_ratio
from pasture.foresight.nodes import LoadModel
from pasture.foresight.nodes_replay import FleetReplay
from pasture.foresight.policies import POLICIES
from pasture.foresight.replay import key_of
from pasture.foresight.traces import read_trace
from tests.unit.foresight.traffic import traffic

REQUESTS = traffic(300, regulars=16)
MODEL = LoadModel(prefill_tokens_per_second=2500.0)
CAPACITY = 300_000
CONVERSATIONS = os.environ.get("PASTURE_CONVERSATION_TRACE")
"""the Mooncake conversation trace, which is not in this repository"""


@pytest.fixture(scope="module")
def found() -> FleetComparison:
    return compare(REQUESTS, 4, CAPACITY, "lru", model=MODEL)


def test_every_rule_serves_everything(found: FleetComparison) -> None:
    assert [result.rule for result in found.results] == list(RULES)
    for result in found.results:
        tally = result.tally
        assert (tally.requests, tally.ended) == (300, 300)
        assert tally.prompt_tokens == sum(request.n_tokens for request in REQUESTS)
        assert 0 < tally.hit_ratio <= unbounded_hit_ratio(REQUESTS)
        assert 1 <= tally.max_over_mean <= 4


def test_the_router_finds_more_than_chance_and_waits_less_than_a_ring(found: FleetComparison) -> None:
    by_rule = {result.rule: result.tally for result in found.results}
    ours = by_rule["pasture"]
    assert ours.hit_ratio > by_rule["random"].hit_ratio
    assert ours.mean_first_token < by_rule["ring"].mean_first_token
    assert by_rule["pasture, no pulls"].moved_bytes == 0
    assert {name for name, tally in by_rule.items() if tally.moved_bytes} <= {"pasture"}


def test_decisions_are_counted(found: FleetComparison) -> None:
    ours, random = found.results[0], found.results[2]
    assert sum(ours.decisions.values()) == 300
    assert ours.decisions[Reason.PREFIX] > 0
    assert ours.decisions[Reason.RING] > 0
    assert random.decisions == {}


def test_the_same_again(found: FleetComparison) -> None:
    again = compare(REQUESTS, 4, CAPACITY, "lru", model=MODEL, rules=("pasture",))
    assert again.results[0] == found.results[0]
    assert again.pool_hit_ratio == found.pool_hit_ratio


def test_at_the_end_the_router_knows_exactly_what_the_nodes_hold() -> None:
    rule = Routed(4, MODEL, MODEL.pull_seconds)
    replay = FleetReplay(4, CAPACITY, POLICIES["lru"], rule, MODEL)
    replay.play(REQUESTS)
    held = {
        key for request in REQUESTS for key in map(key_of, request.blocks) if any(key in node.tier for node in replay.nodes)
    }
    figures = rule.router.statistics()
    assert figures.known_blocks == len(held)
    assert (figures.gaps, figures.stale_events) == (0, 0)
    assert set(figures.uncached_tokens.values()) == {0}


@pytest.mark.parametrize("n", [1, 3, 8, 63])
def test_one_more_node_takes_about_its_share(n: int) -> None:
    assert 0 < taken_by_another(traffic(3000), n) <= 1.5 / (n + 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(CONVERSATIONS is None, reason="PASTURE_CONVERSATION_TRACE names no trace")
def test_eight_nodes_find_what_one_pool_finds_and_share_the_work() -> None:
    found = compare(read_trace(Path(str(CONVERSATIONS))), 8, 16_000_000, "lru", rules=(OURS,))
    [ours] = found.results
    assert found.pool_hit_ratio == pytest.approx(0.336, abs=0.001)
    assert ours.tally.hit_ratio >= 0.95 * found.pool_hit_ratio
    assert ours.tally.max_over_mean <= 1.5
    assert found.taken_by_another_node <= 1.5 / 9
