"""Prefetch: what is expected rises into RAM, in idle moments, within its budgets. No thread: rounds are called."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator

import pytest

from pasture.core.storage import BlockKey
from pasture.core.values import Kind
from pasture.tiers import prefetch
from pasture.tiers.entries import Entry, size_of
from pasture.tiers.eviction import Ordered, Wanted
from pasture.tiers.gate import OpenGate
from pasture.tiers.lifting import Readers
from pasture.tiers.memory import MemoryTier
from pasture.tiers.prefetch import Prefetcher
from pasture.tiers.trail import Trail
from tests.tier_support import NAME, ShelfTier, make_store, put, toks

FIRST, SECOND = toks(range(256)), toks(range(1000, 1256))
BLOCK_BYTES = 64 * 24 + 1
BUDGET = 1 << 26


class Told(Ordered):
    """Expects what it is told, the same of all blocks of a conversation; who is expected less goes first."""

    def __init__(self, wanted: Wanted, rates: dict[BlockKey, float]) -> None:
        super().__init__(lambda entry: (self.expects(entry.block.address.key),), wanted)
        self.rates = rates

    def expects(self, key: BlockKey) -> float:
        return self.rates.get(key, 0.0)

    def admits(self, newcomer: Entry, victim: Entry) -> bool:
        return self.expects(newcomer.block.address.key) > self.expects(victim.block.address.key)


class World:
    """A shelf with two conversations, a RAM tier that has neither, a policy that is told what to expect, and a clock."""

    def __init__(self, budget: int = BUDGET, *, guesses: bool = True, batch_bytes: int = 0) -> None:
        self.now = 0.0
        self.shelf = ShelfTier(batch_bytes=batch_bytes)
        self._fill(FIRST, SECOND)
        self.rates: dict[BlockKey, float] = {}
        self.memory = MemoryTier(budget, policy=lambda wanted: Told(wanted, self.rates), n_writers=1)
        gate = OpenGate(24)
        self.readers = Readers(self.memory, (self.shelf,), gate, lambda: self.now)
        self.prefetcher = Prefetcher(self.memory, (self.shelf,), gate, self.readers, guesses=guesses, clock=lambda: self.now)
        self.shelf.log.clear()

    def _fill(self, *conversations: array[int]) -> None:
        store = make_store(MemoryTier(BUDGET, n_writers=1), (self.shelf,))
        for tokens in conversations:
            put(store, tokens)
        assert store.flush(10)
        store.close()

    def expect(self, tokens: array[int], rate: float) -> None:
        self.rates.update(dict.fromkeys(keys(tokens), rate))

    def waits(self, *conversations: array[int]) -> None:
        for tokens in conversations:
            self.prefetcher.finished(walked(tokens))

    def round(self, at: float) -> None:
        self.now = at
        self.prefetcher.round()

    def reach(self, tokens: array[int]) -> int:
        return self.memory.reach(walked(tokens))

    def take(self, tokens: array[int]) -> None:
        """As a request does."""
        assert self.memory.fetch(walked(tokens), 0, len(tokens))

    def close(self) -> None:
        self.prefetcher.stop(1)
        self.readers.stop(1)


def walked(tokens: array[int]) -> Trail:
    trail = Trail(NAME, b"plain", tokens)
    _ = trail[trail.n_blocks - 1]
    return trail


def keys(tokens: array[int]) -> list[BlockKey]:
    trail = walked(tokens)
    return [trail[index].key for index in range(trail.n_blocks)]


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


def test_who_is_expected_rises_and_who_is_not_stays_where_it_is(world: World) -> None:
    world.expect(FIRST, 0.1)
    world.waits(FIRST, SECOND)
    world.round(5.0)
    assert world.reach(FIRST) == 256
    assert world.reach(SECOND) == 0
    statistics = world.prefetcher.statistics()
    assert (statistics.guesses, statistics.issued_blocks) == (1, 4)
    assert world.memory.unwritten_blocks() == 0  # the slow tier has it
    world.memory.check()


def test_nobody_is_looked_at_who_has_only_just_finished(world: World) -> None:
    world.expect(FIRST, 0.1)
    world.waits(FIRST)
    world.round(0.5)
    assert not world.shelf.log


def test_who_is_back_is_not_expected_any_more(world: World) -> None:
    world.expect(FIRST, 0.1)
    world.waits(FIRST)
    world.prefetcher.arrived(walked(toks([*FIRST, *range(40)])))
    world.round(5.0)
    assert not world.shelf.log


def test_the_soonest_expected_goes_first_and_unused_blocks_are_bounded() -> None:
    world = World(int(8 * size_of_block()))
    world.expect(FIRST, 0.1)
    world.expect(SECOND, 0.2)
    world.waits(FIRST, SECOND)
    world.round(5.0)
    assert world.reach(SECOND) == 256
    assert world.reach(FIRST) == 64  # a block beyond half of RAM: looked at before each
    unused = world.memory.aheads.unused_bytes
    world.take(SECOND)
    assert world.memory.aheads.used_bytes == 4 * size_of_block()
    assert world.memory.aheads.unused_bytes == unused - 4 * size_of_block()
    world.round(6.0)
    assert world.reach(FIRST) > 64
    world.close()


def test_real_work_stops_it_at_the_next_block(world: World) -> None:
    world.expect(FIRST, 0.1)
    world.waits(FIRST)
    world.shelf.open.clear()
    lift = world.readers.lift(walked(SECOND), 0, lambda: None)  # hangs in its first question
    assert lift is not None
    world.round(5.0)
    assert world.reach(FIRST) == 0
    assert world.prefetcher.statistics().cancelled == 1
    world.shelf.open.set()
    lift.finish()
    lift.release()
    world.round(6.0)
    assert world.reach(FIRST) == 256


def test_a_guess_displaces_only_what_is_expected_less() -> None:
    world = World(int(4.2 * size_of_block()))
    world.expect(SECOND, 0.1)
    world.expect(FIRST, 0.05)
    put_in_ram(world, SECOND)
    world.waits(FIRST)
    world.round(5.0)
    assert (world.reach(FIRST), world.reach(SECOND)) == (0, 256)
    reads = world.shelf.calls("get")
    world.round(5.2)
    assert world.shelf.calls("get") == reads  # after a refusal nothing is guessed for a while
    world.expect(FIRST, 0.2)
    world.round(6.0)
    assert world.reach(FIRST) >= 128
    assert world.reach(SECOND) < 256
    world.close()


def test_what_leaves_unused_was_wasted() -> None:
    world = World(int(4.2 * size_of_block()))
    world.expect(FIRST, 0.1)
    world.waits(FIRST)
    world.round(5.0)
    n_bytes = world.memory.aheads.unused_bytes
    assert n_bytes >= 2 * size_of_block()
    world.memory.resize(0)
    assert world.memory.aheads.wasted_bytes == n_bytes == world.memory.aheads.issued_bytes
    assert world.memory.aheads.unused_bytes == 0
    world.close()


def test_bandwidth_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "USUAL_BYTES_PER_SECOND", 8 * BLOCK_BYTES)
    world = World()
    world.expect(FIRST, 0.1)
    world.waits(FIRST)
    world.round(5.0)
    assert world.shelf.calls("get") == 2  # a quarter of 8 blocks a second, and at most a second's worth at once
    world.close()


def test_a_hint_is_lifted_whatever_is_expected_and_stays_until_it_lapses(world: World) -> None:
    ready: list[None] = []
    world.prefetcher.hint(walked(FIRST), lambda: ready.append(None))
    world.round(1.0)
    assert world.reach(FIRST) == 256
    assert len(ready) == 1
    world.memory.resize(0)
    assert world.reach(FIRST) == 256
    world.round(1.0 + prefetch.HINT_SECONDS)
    assert world.reach(FIRST) == 0
    assert len(ready) == 1


def test_a_hint_ends_when_the_request_is_there(world: World) -> None:
    ready: list[None] = []
    world.prefetcher.hint(walked(FIRST), lambda: ready.append(None))
    world.prefetcher.arrived(walked(FIRST))
    assert len(ready) == 1
    world.round(1.0)
    assert not world.shelf.log


def test_without_guesses_hints_are_all_there_is() -> None:
    world = World(guesses=False)
    world.expect(FIRST, 1.0)
    world.waits(FIRST)
    world.round(5.0)
    assert not world.shelf.log
    world.prefetcher.hint(walked(SECOND), lambda: None)
    world.round(6.0)
    assert world.reach(SECOND) == 256
    world.close()


def test_a_tier_with_round_trips_is_asked_for_many_at_once() -> None:
    world = World(batch_bytes=3 * 64 * 24)
    world.expect(FIRST, 1.0)
    world.waits(FIRST)
    world.round(5.0)
    assert world.shelf.batches == [3, 1]
    world.close()


def test_a_look_that_led_to_nothing_is_not_repeated_at_once(world: World) -> None:
    unknown = toks(range(5000, 5256))
    world.expect(unknown, 1.0)
    world.waits(unknown)
    world.round(4.0)
    questions = len(world.shelf.log)
    assert questions
    world.round(5.0)
    assert len(world.shelf.log) == questions
    world.round(7.0)
    assert len(world.shelf.log) > questions


def test_a_block_that_is_not_what_was_asked_for_is_not_taken(world: World) -> None:
    first, second = keys(FIRST)[1], keys(SECOND)[1]
    world.shelf.blocks[first] = world.shelf.blocks[second]
    world.expect(FIRST, 1.0)
    world.waits(FIRST)
    world.round(5.0)
    assert world.reach(FIRST) == 64


def test_a_store_lifts_for_a_hint_on_its_own_thread() -> None:
    world = World()
    store = make_store(MemoryTier(BUDGET, n_writers=1), (world.shelf,))

    there = threading.Event()
    store.finished(NAME, SECOND, Kind.CHAT)
    store.prefetch(NAME, FIRST, there.set)
    assert there.wait(10)
    assert store.reach(NAME, FIRST) == 256
    assert store.statistics().prefetch.hints == 1
    assert store.statistics().prefetch.issued_blocks == 4
    world.close()


def put_in_ram(world: World, tokens: array[int]) -> None:
    for key in keys(tokens):
        world.memory.insert(world.shelf.blocks[key])


def size_of_block() -> int:
    world = World()
    try:
        return size_of(world.shelf.blocks[keys(FIRST)[0]])
    finally:
        world.close()
