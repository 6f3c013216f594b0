"""Slow tiers behind RAM: written behind, fetched ahead; what fails or hangs there costs a miss and nothing else."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from pasture.core.storage import Lift
from pasture.core.values import Form
from pasture.tiers import lifting
from pasture.tiers import store as store_module
from pasture.tiers.block import Block
from pasture.tiers.entries import BLOCK_OVERHEAD_BYTES
from pasture.tiers.gate import CostGate, Gate, OpenGate
from pasture.tiers.keys import Address
from pasture.tiers.lifting import PromptLift
from pasture.tiers.memory import MemoryTier
from pasture.tiers.store import TieredStore
from tests.remote_support import wait_for
from tests.tier_support import NAME, ShelfTier, cells_of, make_store, put, slab_of, toks

LONG = toks(range(300))
BUDGET = 1 << 26
SIZE = 64 * 24 + 1 + BLOCK_OVERHEAD_BYTES
"""of a block in RAM"""


@dataclass
class Ready:
    """Counts how often it was called, and lets a test wait for it."""

    times: int = 0
    event: threading.Event = field(default_factory=threading.Event)

    def __call__(self) -> None:
        self.times += 1
        self.event.set()


def fresh(*tiers: ShelfTier, divisible: bool = True, gate: Gate | None = None, budget: int = BUDGET) -> TieredStore:
    """A server that has just been started over these tiers."""
    return make_store(MemoryTier(budget, divisible=divisible, n_writers=len(tiers)), tiers, gate)


def filled(*conversations: array[int], divisible: bool = True) -> ShelfTier:
    """A tier that an earlier server wrote these to."""
    shelf = ShelfTier()
    store = fresh(shelf, divisible=divisible)
    for tokens in conversations:
        put(store, tokens)
        assert store.flush(10)
    store.close()
    shelf.closed = False
    return shelf


def lift(store: TieredStore, tokens: array[int], have: int = 0) -> Ready:
    """Lift, wait, and let go once it is there."""
    ready = Ready()
    found = store.lift(NAME, tokens, have, ready)
    assert found is not None
    assert ready.event.wait(10)
    assert found.done
    found.release()
    found.release()
    assert ready.times == 1
    return ready


def test_after_a_restart_everything_is_read_back_exactly() -> None:
    shelf = filled(LONG)
    store = fresh(shelf)
    assert store.reach(NAME, LONG) == 0
    lift(store, LONG)
    assert store.reach(NAME, LONG) == 300
    assert cells_of(store.take(NAME, LONG, 0, 300)) == list(slab_of(LONG, 0, 300).cells)
    assert shelf.calls("put") == 5  # what came from there is not written back


def test_only_what_ram_lacks_is_read() -> None:
    shelf = filled(LONG)
    store = fresh(shelf)
    put(store, LONG[:128])
    lift(store, LONG, 128)
    assert shelf.calls("get") == 3
    assert store.reach(NAME, LONG) == 300


@pytest.mark.parametrize(("have", "reads"), [(100, 4), (250, 2), (256, 1), (299, 1)])
def test_a_lift_begins_in_the_block_where_the_live_cache_ends(have: int, reads: int) -> None:
    shelf = filled(LONG)
    store = fresh(shelf)
    lift(store, LONG, have)
    assert shelf.calls("get") == reads
    assert cells_of(store.take(NAME, LONG, have, 300)) == list(slab_of(LONG, have, 300).cells)


def test_the_next_turn_continues_behind_the_short_block() -> None:
    store = fresh(filled(LONG))
    longer = toks([*LONG, *range(1000, 1100)])
    lift(store, longer)
    assert store.reach(NAME, longer) == 300


def test_a_longer_block_takes_the_short_ones_place_on_the_slow_tier() -> None:
    shelf = filled(LONG, toks(range(400)))
    assert sorted(len(block.tokens) for block in shelf.blocks.values()) == [16, *[64] * 6]


def test_the_second_tier_is_asked_for_what_the_first_lacks() -> None:
    first, second = filled(LONG[:128]), filled(LONG)
    first.name = "first"
    store = fresh(first, second)
    lift(store, LONG)
    assert (first.calls("get"), second.calls("get")) == (2, 3)
    assert store.reach(NAME, LONG) == 300
    assert store.flush(10)
    assert len(first.blocks) == 5  # and has it from now on


def test_checkpoints_are_lifted_whole() -> None:
    shelf = filled(LONG[:100], LONG[:192], divisible=False)
    store = fresh(shelf, divisible=False)
    lift(store, LONG[:191])
    assert store.reach(NAME, LONG) == 100
    lift(store, LONG)
    assert store.reach(NAME, LONG) == 192
    assert shelf.calls("get") == 2
    assert cells_of(store.take(NAME, LONG, 0, 192)) == list(slab_of(LONG, 0, 192).cells)
    lift(store, LONG, 192)
    assert shelf.calls("get") == 2


def test_a_missing_or_foreign_block_ends_the_lift_there() -> None:
    shelf = filled(LONG)
    third = next(key for key, block in shelf.blocks.items() if block.address.p0 == 128)
    shelf.blocks[third] = replace(shelf.blocks[third], tokens=toks(range(64)))
    store = fresh(shelf)
    lift(store, LONG)
    assert store.reach(NAME, LONG) == 128


def test_a_payload_that_the_codec_refuses_is_removed_everywhere() -> None:
    shelf = filled(LONG)
    first = next(iter(shelf.blocks))
    shelf.blocks[first] = replace(shelf.blocks[first], payload=shelf.blocks[first].payload[:-3])
    store = fresh(shelf)
    lift(store, LONG)
    assert store.take(NAME, LONG, 0, 300) == ()
    assert store.flush(10)
    assert first not in shelf.blocks


def test_a_lift_holds_what_came_though_the_budget_is_short() -> None:
    shelf = filled(LONG)
    store = fresh(shelf)
    ready = Ready()
    found = store.lift(NAME, LONG, 0, ready)
    assert found is not None
    assert ready.event.wait(10)
    memory = store._memory
    memory.resize(1)
    assert store.reach(NAME, LONG) == 300
    assert memory.pinned_bytes == memory.used_bytes > 0
    found.release()
    memory.resize(1)
    assert store.reach(NAME, LONG) == memory.pinned_bytes == 0


def test_a_lift_takes_no_more_than_ram_holds() -> None:
    shelf = filled(LONG)
    gate = CostGate(cell_bytes=24)
    store = fresh(shelf, gate=gate, budget=2 * 64 * 24 + 100)
    lift(store, LONG)
    assert shelf.calls("get") == 2


class Desk(ShelfTier):
    """Answers what it has at once, and hands nothing out until it is told to."""

    def __init__(self, *conversations: array[int], divisible: bool) -> None:
        super().__init__()
        self.blocks = filled(*conversations, divisible=divisible).blocks
        self.handing_out = threading.Event()

    def get_batch(self, addresses: Sequence[Address], timeout_seconds: float) -> list[Block | None]:
        self.handing_out.wait(60)
        return super().get_batch(addresses, timeout_seconds)


def lift_together(store: TieredStore, tier: Desk, conversations: Sequence[array[int]]) -> list[Lift]:
    """As many readers plan at the same time; returns the lifts when they are over."""
    tier.open.clear()
    waiting = [Ready() for _ in conversations]
    lifts = [store.lift(NAME, tokens, 0, ready) for tokens, ready in zip(conversations, waiting, strict=True)]
    wait_for(lambda: tier.calls("stored") == len(conversations))
    tier.open.set()
    wait_for(lambda: all(isinstance(lift, PromptLift) and lift.planned for lift in lifts))
    tier.handing_out.set()
    assert all(ready.event.wait(10) for ready in waiting)
    return [lift for lift in lifts if lift is not None]


@pytest.mark.parametrize("n_blocks", [0, 1, 7, 20])
def test_lifts_that_begin_together_stay_within_the_budget_together(n_blocks: int) -> None:
    conversations = [toks(range(1000 * number, 1000 * number + 300)) for number in range(lifting.N_READERS)]
    shelf = Desk(*conversations, divisible=True)
    store = fresh(shelf, gate=OpenGate(SIZE // 64), budget=n_blocks * SIZE)
    lifts = lift_together(store, shelf, conversations)
    memory = store._memory
    assert memory.statistics().blocks == n_blocks
    assert memory.pinned_bytes == memory.used_bytes <= memory.budget_bytes
    for found in lifts:
        found.release()
    if n_blocks == 7:
        lift(store, next(tokens for tokens in conversations if not store.reach(NAME, tokens)))
        assert memory.statistics().blocks == 7, "room that was taken for a lift is free again after it"
        assert sum(store.reach(NAME, tokens) for tokens in conversations) > 300


def test_checkpoints_that_are_lifted_together_exceed_the_budget_by_less_than_one() -> None:
    conversations = [toks(range(1000 * number, 1000 * number + 192)) for number in range(lifting.N_READERS)]
    shelf = Desk(*conversations, divisible=False)
    store = fresh(shelf, divisible=False, gate=OpenGate(32), budget=int(1.5 * 192 * 32))
    lift_together(store, shelf, conversations)
    assert store._memory.statistics().blocks == 2


def test_the_gate_refuses_before_anything_is_read() -> None:
    shelf = filled(LONG)
    gate = CostGate(cell_bytes=24, clock=lambda: 0.0)
    gate.observe_prefill(1e9)
    store = fresh(shelf, gate=gate)
    lift(store, LONG)
    assert shelf.calls("get") == 0
    assert store.statistics().gate_refusals == {"fetch": 1}


@pytest.mark.parametrize("divisible", [True, False])
def test_a_failing_tier_is_a_miss(divisible: bool) -> None:
    shelf = ShelfTier()
    shelf.failing = True
    store = fresh(shelf, divisible=divisible)
    lift(store, LONG)
    put(store, LONG)
    assert store.flush(10)
    assert store.reach(NAME, LONG) == 300
    assert store.statistics().tiers[0].errors >= 2


def test_a_tier_that_hangs_ends_the_lift_in_time_and_close_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifting, "SHORTEST_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(lifting, "STUCK_SECONDS", 0.05)
    monkeypatch.setattr(store_module, "CLOSE_SECONDS", 0.05)
    shelf = filled(LONG)
    gate = CostGate(cell_bytes=24)
    gate.observe_prefill(1e5)
    store = fresh(shelf, gate=gate)
    shelf.open.clear()
    for _ in range(lifting.N_READERS):
        lift(store, LONG)  # over when recomputing would be
    patience = threading.Event()
    while store._readers is not None and not store._readers._stuck():
        patience.wait(0.01)
    assert store.lift(NAME, LONG, 0, Ready()) is None
    put(store, LONG)
    assert not store.flush(0.05)
    assert len(store.take(NAME, LONG, 0, 300)) == 5
    store.close()
    assert not shelf.closed
    shelf.open.set()


def test_close_tells_whoever_waits_and_closes_the_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "CLOSE_SECONDS", 0.2)
    shelf = filled(LONG)
    store = fresh(shelf)
    shelf.open.clear()
    waiting = [Ready() for _ in range(8)]
    found = [store.lift(NAME, LONG, 0, ready) for ready in waiting]
    store.close()
    assert [ready.times for ready in waiting] == [1] * 8
    shelf.open.set()
    for one in found:
        assert one is not None
        one.release()
    assert [ready.times for ready in waiting] == [1] * 8
    assert store.lift(NAME, LONG, 0, Ready()) is None
    quiet = fresh(other := ShelfTier())
    quiet.close()
    quiet.close()
    assert other.closed


def test_a_reader_who_fails_when_told_does_no_harm() -> None:
    shelf = filled(LONG)
    store = fresh(shelf)

    def fails() -> None:
        raise RuntimeError("too late")

    found = store.lift(NAME, LONG, 0, fails)
    assert found is not None
    lift(store, LONG)
    found.release()


def test_what_is_evicted_before_its_turn_is_not_waited_for() -> None:
    shelf = ShelfTier()
    store = fresh(shelf)
    shelf.open.clear()
    put(store, LONG)
    patience = threading.Event()
    while not shelf.calls("put"):
        patience.wait(0.01)
    store._memory.resize(0)
    assert store._memory.unwritten_blocks() == 0
    shelf.open.set()
    assert store.flush(10)
    assert [block.address.p0 for block in shelf.blocks.values()] == [0]
    store._memory.check()


def test_the_form_at_the_time_of_writing_is_what_the_slow_tier_gets() -> None:
    shelf = ShelfTier()
    store = fresh(shelf)
    put(store, LONG)
    assert store.flush(10)
    assert {block.form for block in shelf.blocks.values()} == {Form.RAW}
    assert store.statistics().tiers[1].blocks == 5
