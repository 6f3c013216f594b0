"""What a policy does not let into RAM still reaches the disk, within bounds."""

from __future__ import annotations

from pasture.tiers.entries import Entry
from pasture.tiers.eviction import Ordered, Wanted
from pasture.tiers.memory import MemoryTier
from pasture.tiers.room import PASSING_SHARE
from tests.tier_support import NAME, ShelfTier, make_store, put, toks


class Stubborn(Ordered):
    """Keeps what came first."""

    def __init__(self, wanted: Wanted) -> None:
        super().__init__(lambda entry: (entry.last_used,), wanted)

    def admits(self, newcomer: Entry, victim: Entry) -> bool:
        return False


FIRST, SECOND = toks(range(64 * 64)), toks(range(10_000, 10_256))
BUDGET = 64 * 3073 + 1_000
"""bytes: the first conversation and not the second"""


def test_refused_blocks_are_written_and_not_kept() -> None:
    memory = MemoryTier(BUDGET, policy=Stubborn, n_writers=1)
    shelf = ShelfTier()
    store = make_store(memory, [shelf])
    put(store, FIRST)
    store.pin(NAME, FIRST)  # upkeep would make some room
    assert store.flush(30)
    n_before = len(shelf.blocks)
    for _ in range(2):  # the second time there is nothing new
        put(store, SECOND[:192])
        assert store.flush(30)
    memory.check()
    assert store.reach(NAME, FIRST) == len(FIRST)
    assert store.reach(NAME, SECOND) == 0
    assert len(shelf.blocks) - n_before == 3, "all of the second conversation is on disk"


def test_what_waits_for_the_writer_is_bounded_and_counted() -> None:
    memory = MemoryTier(BUDGET, policy=Stubborn, n_writers=1)
    shelf = ShelfTier()
    shelf.open.clear()
    store = make_store(memory, [shelf])
    for start in range(0, 64 * 200, 64):
        put(store, toks(range(5000 + start, 5064 + start)))
        memory.check()
    assert 0 < memory._lines.passing_bytes <= PASSING_SHARE * BUDGET
    assert memory.statistics().in_flight_bytes == memory._lines.passing_bytes
    shelf.open.set()
    assert store.flush(30)
    assert memory._lines.passing_bytes == 0


def test_without_a_slow_tier_nothing_passes() -> None:
    memory = MemoryTier(BUDGET, policy=Stubborn)
    store = make_store(memory)
    put(store, FIRST)
    store.pin(NAME, FIRST)
    put(store, SECOND)
    assert store.reach(NAME, SECOND) == 0
    assert memory.statistics().in_flight_bytes == 0


def test_what_leaves_before_it_is_written_is_written_all_the_same() -> None:
    memory = MemoryTier(32 * 3073 + 1_000, n_writers=1)  # least recently used: what comes pushes out what came before
    shelf = ShelfTier()
    shelf.open.clear()
    store = make_store(memory, [shelf])
    put(store, toks(range(64 * 32)))
    put(store, toks(range(9000, 9064)))
    memory.check()
    assert memory._lines.passing_bytes > 0, "the first conversation's end waits for the writer"
    shelf.open.set()
    assert store.flush(30)
    assert len(shelf.blocks) == 33
    assert memory._lines.passing_bytes == 0
    memory.check()


def test_for_what_passes_by_only_blocks_go_that_every_tier_has() -> None:
    memory = MemoryTier(BUDGET, policy=Stubborn, n_writers=2)
    store = make_store(memory)  # the writers are this test
    put(store, FIRST)
    refused = [toks(range(start, start + 64)) for start in range(20_000, 20_000 + 64 * 40, 64)]
    for tokens in refused:
        put(store, tokens)
    n_first = memory._lines.length(0)
    assert memory.statistics().blocks == 64, "nothing is written yet, so nothing gives up its room"
    for _ in range(n_first):
        memory.next_unwritten(0)
    for tokens in refused:
        put(store, tokens)
    assert memory.statistics().blocks == 64, "the second tier lacks it"
    for _ in range(n_first):
        memory.next_unwritten(1)
    for tokens in refused:
        put(store, tokens)
    assert memory.statistics().blocks < 64
    assert memory._lines.passing_bytes > BUDGET / 16
    memory.check()
