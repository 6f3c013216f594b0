"""Eviction by expected saving in the RAM tier of a server: bytes, depth and pins count."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pasture.core.storage import BLOCK_TOKENS
from pasture.core.values import Form
from pasture.foresight.expected import ATTENTION_TOKENS, FRESH_LEAVES, ExpectedSaving
from pasture.foresight.replay import TrailMaker, VirtualClock
from pasture.tiers.block import Block
from pasture.tiers.entries import BLOCK_OVERHEAD_BYTES, Entry
from pasture.tiers.memory import MemoryTier


def block(maker: TrailMaker, ids: list[int], index: int, n_bytes: int = 0) -> Block:
    trail = maker.trail(ids)
    return Block(trail[index], trail.part(index), Form.RAW, np.zeros(n_bytes, np.uint8))


def policy_and_clock() -> tuple[ExpectedSaving, VirtualClock]:
    clock = VirtualClock()
    return ExpectedSaving(lambda entry: not entry.gone, clock), clock


def test_smaller_and_deeper_blocks_are_worth_more() -> None:
    policy, clock = policy_and_clock()
    maker = TrailMaker()
    trail = maker.trail([1, 2])
    policy.arrived([trail[0].key, trail[1].key])
    shallow, deep = Entry(block(maker, [1, 2], 0, 5000)), Entry(block(maker, [1, 2], 1, 5000))
    squeezed = Entry(block(maker, [1, 2], 0, 1000))
    assert policy.value(deep, clock()) > policy.value(shallow, clock())
    assert policy.value(squeezed, clock()) > 2 * policy.value(shallow, clock())


def test_what_can_be_fetched_is_worth_no_more_than_that_takes() -> None:
    prices, clock, maker = [math.inf], VirtualClock(), TrailMaker()
    policy = ExpectedSaving(lambda entry: not entry.gone, clock, fetch_price=lambda: prices[0])
    path = maker.trail([1, *range(100, 400), 2])
    policy.arrived([path[index].key for index in range(path.n_blocks)])
    shallow, deep = (Entry(block(maker, [1, *range(100, 400), 2], index)) for index in (0, 301))

    def ratio() -> float:
        policy.offered(shallow)
        clock.now += 10.0
        policy.victim()  # the order is made anew, with it the price
        return policy.value(deep, clock()) / policy.value(shallow, clock())

    assert ratio() == pytest.approx(1 + 301 * BLOCK_TOKENS / ATTENTION_TOKENS)
    prices[0] = 1.1
    assert ratio() == pytest.approx(1.1)
    prices[0] = 0.1
    worth = policy.value(shallow, clock())
    assert ratio() == pytest.approx(1.0)
    assert policy.value(shallow, clock()) < 0.2 * worth


def test_the_order_follows_the_clock_without_any_use() -> None:
    policy, clock = policy_and_clock()
    maker = TrailMaker()
    old, young = Entry(block(maker, [1], 0)), Entry(block(maker, [2], 0))
    policy.arrived([old.block.address.key])
    policy.offered(old)
    clock.now = 3000.0
    policy.arrived([young.block.address.key])
    policy.offered(young)
    assert policy.victim() is old
    assert policy.victim() is young
    assert policy.victim() is None


def test_a_newcomer_that_is_worth_no_more_is_refused() -> None:
    policy, _ = policy_and_clock()
    maker = TrailMaker()
    one, other = Entry(block(maker, [1], 0)), Entry(block(maker, [2], 0))
    for entry in (one, other):
        policy.arrived([entry.block.address.key])
    assert not policy.admits(one, other)
    assert not policy.admits(other, one)


def test_pinned_blocks_stay_and_forced_ones_come_in() -> None:
    clock = VirtualClock()
    tier = MemoryTier(2 * BLOCK_OVERHEAD_BYTES, policy=lambda wanted: ExpectedSaving(wanted, clock))
    maker = TrailMaker()
    for ids in ([1], [2], [3]):
        tier.arrived(maker.trail(ids))
    pin = tier.insert_pinned(block(maker, [1], 0))
    assert tier.insert(block(maker, [2], 0))
    forced = tier.insert_pinned(block(maker, [3], 0))
    assert block(maker, [1], 0).address.key in tier
    assert block(maker, [2], 0).address.key not in tier
    pin.release()
    forced.release()
    tier.check()


def test_what_was_offered_and_never_asked_for_is_kept_in_order_now_and_then() -> None:
    policy, _ = policy_and_clock()
    maker = TrailMaker()
    for number in range(FRESH_LEAVES + 10):
        policy.offered(Entry(block(maker, [number], 0)))
    assert len(policy._fresh) <= 10
    assert BLOCK_TOKENS == 64
