"""The guard's arithmetic, and what the background thread does with it."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from pasture.core.values import Form
from pasture.tiers.compression import Compression, Squeezer
from pasture.tiers.entries import size_of
from pasture.tiers.gate import OpenGate
from pasture.tiers.guard import MIB, GuardLimits, MemoryGuard, give_back_freed_memory
from pasture.tiers.memory import MemoryTier
from pasture.tiers.store import open_store
from pasture.tiers.upkeep import GIVE_BACK_BYTES, Upkeep
from tests.blocks import blocks, conversation
from tests.tier_support import NAME, OPENED, PlainCodec, put, toks

LIMITS = GuardLimits(reserve_bytes=100 * MIB, comfort_bytes=200 * MIB)


class Machine:
    """Memory that the tier's use comes out of, and other processes' too."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.tier = 0

    def available(self) -> int:
        return self.total - self.tier


def test_with_plenty_free_the_budget_is_the_configured_one() -> None:
    guard = MemoryGuard(1000 * MIB, lambda: 5000 * MIB, LIMITS)
    assert guard.budget(500 * MIB) == 1000 * MIB
    assert not guard.shrunken


def test_it_shrinks_before_the_machine_runs_out_and_widens_slowly() -> None:
    machine = Machine(700 * MIB)
    guard = MemoryGuard(1000 * MIB, machine.available, LIMITS)
    budgets = []
    for _ in range(20):  # the tier grows by what it may
        budget = guard.budget(machine.tier)
        machine.tier = min(machine.tier + 50 * MIB, budget)
        budgets.append(budget)
        assert machine.available() >= 50 * MIB
    assert guard.shrunken
    assert budgets[-1] == budgets[-2] < 600 * MIB  # it does not swing
    machine.total = 5000 * MIB
    first = guard.budget(machine.tier)
    assert budgets[-1] < first
    for _ in range(10):
        last = guard.budget(machine.tier)
    assert last == 1000 * MIB
    assert not guard.shrunken


def test_between_the_limits_nothing_changes() -> None:
    machine = Machine(250 * MIB)
    machine.tier = 200 * MIB
    guard = MemoryGuard(1000 * MIB, machine.available, LIMITS)
    shrunk = guard.budget(machine.tier)
    assert shrunk == 100 * MIB  # 100 back, to be in the middle
    machine.tier = shrunk
    assert guard.budget(machine.tier) == shrunk


def test_it_goes_down_to_nothing_and_no_further() -> None:
    guard = MemoryGuard(1000 * MIB, lambda: 0, LIMITS)
    assert guard.budget(10 * MIB) == 0


def upkeep(memory: MemoryTier, guard: MemoryGuard | None, given_back: list[int]) -> Upkeep:
    squeezer = Squeezer(memory, PlainCodec(), Compression.OFF, ())
    return Upkeep(memory, squeezer, guard=guard, readers=None, clock=lambda: 0.0, give_back=lambda: given_back.append(1))


def test_a_round_shrinks_the_tier_and_gives_the_memory_back() -> None:
    free = [500 * MIB]
    memory, given_back = MemoryTier(10_000), list[int]()
    store_guard = MemoryGuard(10_000, lambda: free[0], LIMITS)
    care = upkeep(memory, store_guard, given_back)
    care.round()
    assert (memory.budget_bytes, given_back) == (10_000, [])
    free[0] = 0
    care.round()
    assert (memory.budget_bytes, given_back) == (0, [1])
    free[0] = 500 * MIB
    care.round()
    assert (memory.budget_bytes, given_back) == (10_000, [1])


def test_memory_is_given_back_when_much_has_left_though_as_much_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, given_back = MemoryTier(10 * GIVE_BACK_BYTES), list[int]()
    care = upkeep(memory, None, given_back)
    for gone, times in ((1.0, 0), (1.2, 0), (1.3, 1), (2.5, 1), (2.6, 2)):  # an eighth of the budget is 1.25
        monkeypatch.setattr(memory._books, "gone_bytes", int(gone * GIVE_BACK_BYTES))
        care.round()
        assert len(given_back) == times
    memory.resize(GIVE_BACK_BYTES)
    monkeypatch.setattr(memory._books, "gone_bytes", int(3.5 * GIVE_BACK_BYTES))
    care.round()
    assert len(given_back) == 2, "it is not worth it for less"


def test_what_has_left_is_counted_whether_evicted_or_squeezed() -> None:
    memory = MemoryTier(1 << 20, squeeze_stages=1)
    block = next(blocks(conversation(1, 64)))
    assert memory.insert(block)
    smaller = replace(block, form=Form.Q8_0, payload=block.payload[:10])
    assert memory.replace(block, smaller, 1)
    assert memory.gone_bytes == size_of(block)
    memory.resize(0)
    assert memory.gone_bytes == size_of(block) + size_of(smaller)


def test_giving_back_does_no_harm() -> None:
    give_back_freed_memory()


def test_an_open_store_squeezes_and_guards_by_itself() -> None:
    shrunk = threading.Event()
    free = [1000 * MIB]

    def available() -> int:
        shrunk.set()
        return free[0]

    store = open_store(
        PlainCodec(), 1 << 20, divisible=True, compression=Compression.Q8_0, available=available, limits=LIMITS, gate=OpenGate()
    )
    OPENED.append(store)
    tokens = toks(range(250))
    put(store, tokens)
    patience = threading.Event()
    while store.statistics().tiers[0].bytes_by_form.keys() != {Form.Q8_0}:
        patience.wait(0.01)
    free[0] = 0
    while store.reach(NAME, tokens):
        patience.wait(0.01)
    assert store.statistics().tiers[0].budget_bytes == 0
