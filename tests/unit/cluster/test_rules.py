"""The rules that the router is compared with, on nodes that look as the test wants."""

from __future__ import annotations

import numpy as np

from pasture.cluster.rules import Anywhere, ByBoundedRing, ByRing, DynamoLike, SglangLike
from pasture.core.storage import BLOCK_TOKENS
from pasture.core.values import Form
from pasture.foresight.nodes import Choice, Job, Node
from pasture.foresight.replay import TrailMaker
from pasture.foresight.traces import TRACE_BLOCK_TOKENS, TraceRequest
from pasture.tiers.block import Block
from pasture.tiers.eviction import least_recently_used

MAKER = TrailMaker()


def job(*blocks: int) -> Job:
    trail = MAKER.trail(blocks)
    request = TraceRequest(0.0, len(blocks) * TRACE_BLOCK_TOKENS, blocks)
    return Job(0, request, trail, tuple(trail[index].key for index in range(trail.n_blocks)))


def nodes(n: int = 4) -> list[Node]:
    return [Node(number, 100 * TRACE_BLOCK_TOKENS, least_recently_used) for number in range(n)]


def give(node: Node, *blocks: int) -> None:
    trail = MAKER.trail(blocks)
    for index in range(trail.n_blocks):
        node.tier.insert(Block(trail[index], trail.part(index), Form.RAW, np.empty(0, np.uint8)))
    assert node.tier.reach(trail) == len(blocks) * BLOCK_TOKENS


def test_anywhere_is_everywhere_and_the_same_again() -> None:
    one, other = Anywhere(4), Anywhere(4)
    chosen = [one.place(job(1), nodes()).node for _ in range(50)]
    assert set(chosen) == {0, 1, 2, 3}
    assert chosen == [other.place(job(1), nodes()).node for _ in range(50)]


def test_the_ring_looks_at_two_blocks() -> None:
    rule = ByRing(4)
    assert len({rule.place(job(0, number), nodes()).node for number in range(1, 40)}) == 4
    assert rule.place(job(0, 5, 6), nodes()) == rule.place(job(0, 5, 7), nodes())


def test_the_bounded_ring_passes_over_who_has_too_much() -> None:
    rule, there = ByBoundedRing(4), nodes()
    first, second = rule.order(job(0, 1))[:2]
    assert rule.place(job(0, 1), there) == Choice(first)
    there[first].uncached_tokens = 100_000
    assert rule.place(job(0, 1), there) == Choice(second)
    for node in there:
        node.uncached_tokens = 100_000
    assert rule.place(job(0, 1), there) == Choice(first)


def test_sglang_like_prefers_a_good_match_until_queues_are_far_apart() -> None:
    rule, there = SglangLike(4), nodes()
    give(there[2], 1, 2, 3)
    give(there[3], 1, 2, 3)
    there[2].n_requests, there[3].n_requests, there[0].n_requests = 9, 8, 1
    assert rule.place(job(1, 2, 3, 4), there) == Choice(3)
    assert rule.place(job(*range(1, 12)), there) == Choice(1), "3 of 11 blocks are too few"
    there[3].n_requests = there[2].n_requests = 65
    assert rule.place(job(1, 2, 3, 4), there) == Choice(1)


def test_dynamo_like_adds_what_has_to_be_computed_to_what_is_active() -> None:
    rule, there = DynamoLike(4), nodes()
    give(there[2], 1, 2, 3)
    assert rule.place(job(1, 2, 3, 4), there) == Choice(2)
    there[2].active_blocks = 2
    assert rule.place(job(1, 2, 3, 4), there) == Choice(2)
    there[2].uncached_tokens = 2 * TRACE_BLOCK_TOKENS
    assert rule.place(job(1, 2, 3, 4), there) == Choice(0)
