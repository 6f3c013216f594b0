"""The store over RAM alone: what is put comes back, exactly, and only where it belongs."""

from __future__ import annotations

import logging
from itertools import pairwise

import pytest

from pasture.core.values import Form, Namespace
from pasture.tiers.block import Block
from pasture.tiers.gate import CostGate
from tests.tier_support import NAME, PlainCodec, cells_of, put, ram_store, slab_of, toks

LONG = toks(range(300))


def test_what_was_put_comes_back_exactly_for_any_range() -> None:
    store, memory = ram_store()
    put(store, LONG)
    assert store.reach(NAME, LONG) == 300
    for p0, p1 in ((0, 300), (0, 1), (63, 65), (64, 128), (10, 299), (299, 300)):
        slabs = store.take(NAME, LONG, p0, p1)
        assert cells_of(slabs) == list(slab_of(LONG, p0, p1).cells), (p0, p1)
        assert all(before.p1 == after.p0 for before, after in pairwise(slabs))
    memory.check()


def test_saving_pays_where_something_stays_and_moving_it_beats_computing_it() -> None:
    store, _ = ram_store(gate=(gate := CostGate()))
    assert store.worth_saving(300)
    store.observe_prefill(1e12)
    assert not store.worth_saving(300)
    assert gate.figures().refusals == {"spill": 1}
    nothing_stays, _ = ram_store(0)
    assert not nothing_stays.worth_saving(300)


def test_nothing_is_known_of_other_tokens_namespaces_and_models() -> None:
    store, _ = ram_store()
    put(store, LONG)
    assert store.reach(Namespace("others"), LONG) == 0
    assert store.reach(NAME, toks(range(1, 301))) == 0
    other, _ = ram_store(codec=PlainCodec(b"another model"))
    assert other.reach(NAME, LONG) == 0
    assert store.take(Namespace("others"), LONG, 0, 300) == ()
    assert store.take(NAME, toks([]), 0, 0) == ()


def test_a_prompt_that_parts_inside_a_block_reuses_what_agrees() -> None:
    store, _ = ram_store()
    put(store, LONG)
    fork = toks([*range(100), 9, 9, *range(200)])
    assert store.reach(NAME, fork) == 100
    assert cells_of(store.take(NAME, fork, 0, 100)) == list(slab_of(fork, 0, 100).cells)
    assert store.take(NAME, fork, 0, 101) == ()


def test_a_shorter_and_a_longer_prompt_use_the_same_blocks() -> None:
    store, _ = ram_store()
    put(store, LONG)
    assert store.reach(NAME, LONG[:70]) == 70
    assert store.reach(NAME, toks(range(400))) == 300
    assert store.gap(NAME, LONG[:70], 0) == 70
    assert store.gap(NAME, LONG, 130) == 300


def test_only_what_is_missing_is_packed_again() -> None:
    codec = PlainCodec()
    store, memory = ram_store(codec=codec)
    put(store, LONG)
    assert codec.n_packed == 5
    longer = toks(range(400))
    assert store.gap(NAME, longer, 0) == 256
    put(store, longer)
    assert codec.n_packed == 8
    assert memory.statistics().blocks == 7  # the short block of 300 is part of the full one now
    fork = toks([*range(130), *range(900, 1000)])
    assert store.gap(NAME, fork, 0) == 128
    put(store, fork)
    assert store.reach(NAME, fork) == 230
    assert store.reach(NAME, longer) == 400


def test_a_tail_can_be_stored_while_its_head_lives_elsewhere() -> None:
    store, _ = ram_store()
    assert store.gap(NAME, LONG, 200) == 192
    store.put(NAME, LONG, slab_of(LONG, 192, 300))
    assert store.reach(NAME, LONG) == 0
    assert cells_of(store.take(NAME, LONG, 200, 300)) == list(slab_of(LONG, 200, 300).cells)
    assert store.gap(NAME, LONG, 0) == 0
    put(store, LONG)
    assert store.reach(NAME, LONG) == 300


def test_a_slab_that_begins_inside_a_block_is_a_misuse() -> None:
    store, _ = ram_store()
    with pytest.raises(ValueError, match="inside a block"):
        store.put(NAME, LONG, slab_of(LONG, 10, 300))


def test_what_the_codec_refuses_is_dropped_and_was_a_miss(caplog: pytest.LogCaptureFixture) -> None:
    store, memory = ram_store()
    put(store, LONG)
    trail = store._trails.of(NAME, LONG)
    victim = memory.fetch(trail, 64, 128)[0]
    assert memory.replace(victim, Block(victim.address, victim.tokens, Form.RAW, victim.payload[:-1]), 0)
    with caplog.at_level(logging.WARNING):
        assert store.take(NAME, LONG, 0, 300) == ()
    assert len(caplog.records) == 1
    assert memory.statistics().damaged_blocks == 1
    assert store.reach(NAME, LONG) == 64
    put(store, LONG, 64)
    assert cells_of(store.take(NAME, LONG, 0, 300)) == list(slab_of(LONG, 0, 300).cells)


def test_checkpoints_are_whole_and_found_anywhere_in_a_prompt() -> None:
    store, memory = ram_store(divisible=False)
    early, late = LONG[:100], LONG[:192]
    for tokens in (early, late):
        assert store.gap(NAME, tokens, 50) == 0
        put(store, tokens)
        assert store.gap(NAME, tokens, 50) == len(tokens)
    assert memory.statistics().blocks == 2
    assert store.reach(NAME, LONG) == 192
    assert store.reach(NAME, LONG[:191]) == 100
    assert store.reach(NAME, LONG[:99]) == 0
    assert store.reach(NAME, toks([*range(100), *range(500, 600)])) == 100
    assert cells_of(store.take(NAME, LONG, 0, 100)) == list(slab_of(LONG, 0, 100).cells)
    assert cells_of(store.take(NAME, LONG, 0, 192)) == list(slab_of(LONG, 0, 192).cells)
    assert store.take(NAME, LONG, 0, 150) == ()
    assert store.take(NAME, LONG, 64, 192) == ()


@pytest.mark.parametrize("divisible", [True, False])
def test_what_is_held_stays_and_comes_back_whatever_the_budget_says(divisible: bool) -> None:
    store, memory = ram_store(6000, divisible=divisible)
    if divisible:
        put(store, LONG[:64])
    pin = store.hold(NAME, LONG, slab_of(LONG, 0, 300))
    assert memory.pinned_bytes == memory.used_bytes > 0
    put(store, toks(range(500, 600)))
    memory.trim()
    assert cells_of(store.take(NAME, LONG, 0, 300)) == list(slab_of(LONG, 0, 300).cells)
    memory.check()
    pin.release()
    pin.release()
    assert memory.pinned_bytes == 0
    assert memory.used_bytes <= 6000
    memory.check()


def test_a_model_so_fast_that_fetching_loses_fetches_nothing() -> None:
    gate = CostGate(cell_bytes=24, clock=lambda: 0.0)
    store, _ = ram_store(gate=gate)
    put(store, LONG)
    assert len(store.take(NAME, LONG, 0, 300)) == 5
    store.observe_prefill(1e12)
    assert store.take(NAME, LONG, 0, 300) == ()
    assert store.gap(NAME, toks(range(5, 300)), 0) == 295
    assert store.statistics().gate_refusals == {"fetch": 1, "spill": 1}
    store.observe_prefill(300)
    assert len(store.take(NAME, LONG, 0, 300)) == 5
