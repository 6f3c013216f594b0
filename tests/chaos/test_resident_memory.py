"""What the RAM tier takes of the system's memory is what it counts, and what operations.md says is beside that.

Conversations come, go on, are fetched, pinned, squeezed, evicted, written to disk and lifted back at random, over the fake
engine's slabs. Once with small blocks, by what Python and numpy have allocated, which shows what is counted too low; once with
large ones, by what is resident, which shows what the C library keeps.
"""

from __future__ import annotations

import gc
import random
import sys
import threading
import time
import tracemalloc
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

from pasture.core.storage import Bytes, Pin
from pasture.core.values import Form, Kind, Slab
from pasture.engine.fake import Cell, FakeSlab
from pasture.foresight.policies import POLICIES
from pasture.tiers.compression import Compression
from pasture.tiers.disk import DiskTier
from pasture.tiers.gate import OpenGate
from pasture.tiers.lifting import N_READERS
from pasture.tiers.room import BESIDE_SHARE
from pasture.tiers.store import TieredStore, open_store
from pasture.tiers.upkeep import GIVE_BACK_BYTES, GIVE_BACK_SHARE
from tests.tier_support import NAME, PlainCodec, toks

MIB = 1 << 20
CELL = Cell(1, 0, 0)
"""as good as any: nobody looks into it here"""
REMEMBERED_BYTES = 8 * MIB
"""beside all blocks: trails, the policy's past, the disk's index; little is remembered in so short a time"""
LATE_BYTES = 64 * MIB
"""what leaves RAM here while whoever gives it back waits for a processor"""
IN_FLIGHT_BLOCKS = N_READERS + 4
"""the readers', a writer's, the squeezer's, one that is fetched ahead, and one that the engine packs or unpacks"""


class Wide(PlainCodec):
    """So many bytes a block, which do not compress; half in Q8_0, a quarter in Q4_0."""

    def __init__(self, block_bytes: int) -> None:
        super().__init__()
        self.block_bytes = block_bytes
        self._noise = np.random.default_rng(3).integers(0, 256, block_bytes, np.uint8)

    def pack(self, slab: Slab) -> Bytes:
        assert isinstance(slab, FakeSlab)
        return self._noise[: self.block_bytes * len(slab.cells) // 64].copy()

    def unpack(self, payload: Bytes, p0: int, p1: int) -> FakeSlab:
        return FakeSlab(p0, (CELL,) * (p1 - p0))

    def squeeze(self, payload: Bytes, form: Form) -> Bytes:
        return payload[: payload.nbytes // 2].copy()


class Load:
    """Random use of a store."""

    def __init__(self, store: TieredStore, seed: int) -> None:
        self._store = store
        self._random = random.Random(seed)
        self._pins: list[Pin] = []

    def step(self) -> None:
        choice = self._random
        talk = toks([choice.randrange(3000), *range(700)])
        tokens = talk[: choice.randint(1, len(talk))]
        self._store.arrived(NAME, tokens)
        move = choice.random()
        if move < 0.1:
            self._lift(tokens)
        elif move < 0.2:
            self._pins.append(self._store.pin(NAME, tokens))
        reach = self._store.reach(NAME, tokens)
        self._store.take(NAME, tokens, 0, reach)
        gap = self._store.gap(NAME, tokens, 0)
        if gap < len(tokens):
            self._store.put(NAME, tokens, FakeSlab(gap, (CELL,) * (len(tokens) - gap)))
        self._store.finished(NAME, tokens, Kind.CHAT)
        if len(self._pins) > 3:
            self._pins.pop(0).release()

    def end(self) -> None:
        for pin in self._pins:
            pin.release()

    def _lift(self, tokens: array[int]) -> None:
        over = threading.Event()
        lift = self._store.lift(NAME, tokens, 0, over.set)
        if lift is not None:
            over.wait(10)
            lift.release()


@contextmanager
def opened(where: Path, block_bytes: int, budget_bytes: int, policy: str) -> Iterator[TieredStore]:
    store = open_store(
        Wide(block_bytes),
        budget_bytes,
        divisible=True,
        slow=(DiskTier(where, 2 * budget_bytes),),
        compression=Compression.AUTO,
        gate=OpenGate(block_bytes // 64),
        policy=POLICIES[policy](time.monotonic),
    )
    try:
        yield store
    finally:
        store.close()


def counted(store: TieredStore) -> int:
    ram = store.statistics().tiers[0]
    return ram.bytes + ram.in_flight_bytes


@pytest.mark.parametrize("policy", ["lru", "foresight"])
def test_what_is_allocated_is_what_is_counted_and_that_stays_within_the_budget(tmp_path: Path, policy: str) -> None:
    budget, block_bytes = 6 * MIB, 20_000
    tracemalloc.start()
    try:
        with opened(tmp_path, block_bytes, budget, policy) as store:
            before, load = tracemalloc.get_traced_memory()[0], Load(store, seed=1)
            for step in range(600):
                load.step()
                if step % 25 == 0:
                    gc.collect()
                    assert counted(store) <= (1 + BESIDE_SHARE) * budget + IN_FLIGHT_BLOCKS * block_bytes
                    assert tracemalloc.get_traced_memory()[0] - before <= counted(store) + REMEMBERED_BYTES
            assert counted(store) > 0.75 * budget
            load.end()
            store._memory.resize(0)
            assert store.flush(20)
            gc.collect()
            assert tracemalloc.get_traced_memory()[0] - before <= REMEMBERED_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is given back")
def test_what_is_resident_is_the_budget_and_no_more_than_is_said(tmp_path: Path) -> None:
    budget, block_bytes = 256 * MIB, 400_000
    said = budget + BESIDE_SHARE * budget + max(GIVE_BACK_BYTES, GIVE_BACK_SHARE * budget) + IN_FLIGHT_BLOCKS * block_bytes
    process = psutil.Process()
    before, most = process.memory_info().rss, 0
    with opened(tmp_path, block_bytes, budget, "lru") as store:
        load = Load(store, seed=2)
        while store.statistics().tiers[0].written_bytes < 10 * budget:
            load.step()
            most = max(most, process.memory_info().rss - before)
        load.end()
        assert 0.75 * budget < most <= said + REMEMBERED_BYTES + LATE_BYTES
