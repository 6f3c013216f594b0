"""Everything at once in one store: puts and takes while blocks are squeezed, evicted, written, fetched, pinned and damaged."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest

from pasture.tiers.compression import EVERY_FORM, Compression, Squeezer, ladder
from pasture.tiers.gate import OpenGate
from pasture.tiers.memory import MemoryTier
from pasture.tiers.store import TieredStore
from tests.tier_support import NAME, PlainCodec, ShelfTier, cells_of, slab_of, toks

N_ROUNDS = 300
BUDGET = 120_000
"""about forty blocks, so that eviction never rests"""
CONVERSATIONS = [toks([*range(100), 500 + number, *range(60 + 17 * number)]) for number in range(12)]


class Crowd:
    """Threads that do their one thing until told to stop; what they raise is kept."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def add(self, work: Callable[[], object]) -> None:
        def run() -> None:
            try:
                while not self._stop.wait(0.001):
                    work()
            except BaseException as error:
                self.errors.append(error)

        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(20)


@pytest.mark.parametrize("divisible", [True, False])
def test_whatever_happens_at_once_what_is_taken_is_right(divisible: bool) -> None:
    codec, shelf, chance = PlainCodec(pad_bytes=500), ShelfTier(), random.Random(7)
    memory = MemoryTier(BUDGET, divisible=divisible, n_writers=1, squeeze_stages=len(ladder(Compression.AUTO, EVERY_FORM)))
    store = TieredStore(codec, memory, OpenGate(), slow=(shelf,))
    squeezer = Squeezer(memory, codec, Compression.AUTO, EVERY_FORM)
    budgets = random.Random(8)

    def damage() -> None:
        for key, block in list(shelf.blocks.items())[:1]:
            shelf.blocks[key] = replace(block, payload=block.payload[:-2])

    crowd = Crowd()
    crowd.add(lambda: [squeezer.step() for _ in range(5)])
    crowd.add(lambda: memory.resize(budgets.choice((BUDGET, BUDGET // 2, BUDGET // 5))))
    crowd.add(memory.trim)
    crowd.add(damage)
    crowd.add(store.statistics)
    crowd.add(memory.check)
    n_taken, ready_calls, pins = 0, [], []
    for _ in range(N_ROUNDS):
        tokens = chance.choice(CONVERSATIONS)[: chance.randint(1, 300)]
        gap = store.gap(NAME, tokens, 0)
        if gap < len(tokens):
            store.put(NAME, tokens, slab_of(tokens, gap, len(tokens)))
        wanted = chance.choice(CONVERSATIONS)
        arrived = threading.Event()
        lift = store.lift(NAME, wanted, store.reach(NAME, wanted), arrived.set)
        if lift is not None:
            ready_calls.append(arrived)
            if chance.random() < 0.7:
                assert arrived.wait(20)
        pins.append(store.pin(NAME, wanted))
        reach = store.reach(NAME, wanted)
        slabs = store.take(NAME, wanted, 0, reach)
        if slabs:
            n_taken += 1
            assert cells_of(slabs) == list(slab_of(wanted, 0, reach).cells)
        if lift is not None:
            lift.release()
        if len(pins) > 3:
            pins.pop(0).release()
    crowd.end()
    for pin in pins:
        pin.release()
    assert not crowd.errors
    assert n_taken > N_ROUNDS // 3
    assert all(event.wait(20) for event in ready_calls)
    assert store.flush(20)
    memory.check()
    store.close()
    assert memory.pinned_bytes == 0
