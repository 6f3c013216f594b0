"""All tiers below the live cache behind one `core.storage.Store`.

    engine thread        reach  take  gap  put  pin          RAM only: microseconds a block, and the copying

Owns the way between slabs and blocks: cutting, packing, unpacking, and cutting again where a prompt parts from a block. Keys
are `trail`'s business, what is kept is `memory`'s, what pays is `gate`'s. A payload that the codec refuses is dropped and was a
miss. No lock is held while bytes are packed or unpacked.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence

from pasture.core.errors import EngineError
from pasture.core.ports import Clock
from pasture.core.storage import Lift, Pin, SlabCodec, StoreStatistics
from pasture.core.values import Form, Namespace, Slab, Transfer
from pasture.tiers.block import Block
from pasture.tiers.gate import Gate
from pasture.tiers.memory import MemoryTier
from pasture.tiers.trail import Trails

log = logging.getLogger(__name__)


class TieredStore:
    """See the module and `core.storage.Store`."""

    def __init__(self, codec: SlabCodec, memory: MemoryTier, gate: Gate, *, clock: Clock = time.perf_counter) -> None:
        self._codec = codec
        self._memory = memory
        self._gate = gate
        self._clock = clock
        self._trails = Trails(codec.fingerprint)
        self._warned_of_damage = False

    # Engine thread

    def reach(self, namespace: Namespace, tokens: array[int]) -> int:
        return self._memory.reach(self._trails.of(namespace, tokens))

    def lift(self, namespace: Namespace, tokens: array[int], have: int, ready: Callable[[], None]) -> Lift | None:
        self._memory.count_missed(len(tokens) - have)
        return None

    def take(self, namespace: Namespace, tokens: array[int], p0: int, p1: int) -> tuple[Slab, ...]:
        if p0 >= p1:
            return ()
        blocks = self._memory.fetch(self._trails.of(namespace, tokens), p0, p1)
        stored: Counter[Form] = Counter()
        for block in blocks:
            stored[block.form] += block.n_bytes
        if not blocks or not self._gate.fetch(p1 - p0, stored):
            return ()
        slabs = []
        for block in blocks:
            slab = self._unpack(block)
            if slab is None:
                return ()
            slabs.append(slab.cut(max(p0, slab.p0), min(p1, slab.p1)))
        return tuple(slabs)

    def gap(self, namespace: Namespace, tokens: array[int], p0: int) -> int:
        missing = self._memory.missing(self._trails.of(namespace, tokens), p0, len(tokens))
        if not missing:
            return len(tokens)
        start = missing[0].p0 if self._memory.divisible else 0
        return start if self._gate.spill(len(tokens) - start) else len(tokens)

    def put(self, namespace: Namespace, tokens: array[int], slab: Slab) -> None:
        trail = self._trails.of(namespace, tokens[: slab.p1])
        whole = not self._memory.divisible
        for address in self._memory.missing(trail, slab.p0, slab.p1, use=True):
            p0 = 0 if whole else address.p0
            if p0 < slab.p0:
                raise ValueError(f"a slab of [{slab.p0}, {slab.p1}) begins inside a block")
            payload = self._codec.pack(slab.cut(p0, address.p1))
            block = Block(address, tokens[address.p0 : address.p1], Form.RAW, payload, whole)
            if not self._memory.insert(block):
                break  # what follows could not be reached

    def pin(self, namespace: Namespace, tokens: array[int]) -> Pin:
        return self._memory.pin(self._trails.of(namespace, tokens))

    def observe(self, transfers: Sequence[Transfer]) -> None:
        self._gate.observe(transfers)

    def observe_prefill(self, tokens_per_second: float) -> None:
        self._gate.observe_prefill(tokens_per_second)

    # Any thread

    def statistics(self) -> StoreStatistics:
        figures = self._gate.figures()
        ram = self._memory.statistics(bytes_per_second=figures.restore_bytes_per_second)
        return StoreStatistics(
            tiers=(ram,),
            prefill_tokens_per_second=figures.prefill_tokens_per_second,
            save_bytes_per_second=figures.save_bytes_per_second,
            restore_bytes_per_second=figures.restore_bytes_per_second,
            gate_refusals=figures.refusals,
        )

    def flush(self, timeout_seconds: float) -> bool:
        return True

    def close(self) -> None:
        pass

    # Inside

    def _unpack(self, block: Block) -> Slab | None:
        started = self._clock()
        address = block.address
        try:
            slab = self._codec.unpack(block.payload, 0 if block.whole else address.p0, address.p1)
        except EngineError as error:
            self._forget(block, error)
            return None
        self._gate.observe_unpack(block.form, block.n_bytes, self._clock() - started)
        return slab

    def _forget(self, block: Block, error: EngineError) -> None:
        self._memory.drop_damaged(block)
        if not self._warned_of_damage:
            self._warned_of_damage = True
            log.warning("a stored block was refused, and dropped; others that are will be counted only: %s", error)
