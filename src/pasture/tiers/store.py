"""All tiers below the live cache behind one `core.storage.Store`.

    engine thread     reach  take  gap  put  pin  lift      RAM only: microseconds a block, and the copying of what moves
    writer            new blocks -> slow tiers              (writing)
    readers           slow tiers -> RAM, for lifts          (lifting)
    upkeep            budget, watermarks, compression       (upkeep)

Owns the way between slabs and blocks: cutting, packing, unpacking, and cutting again where a prompt parts from a block. Keys
are `trail`'s business, what is kept is `memory`'s, what pays is `gate`'s. A payload that the codec refuses is dropped and was a
miss. No lock is held while bytes are packed or unpacked.
"""

from __future__ import annotations

import logging
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from pasture.core.errors import EngineError
from pasture.core.ports import Clock
from pasture.core.storage import Lift, Pin, PrefetchStatistics, SlabCodec, StoreStatistics
from pasture.core.values import Allowance, Form, Kind, Namespace, Slab, Transfer
from pasture.tiers.block import Block
from pasture.tiers.compression import EVERY_FORM, Compression, Squeezer, inflate, ladder
from pasture.tiers.eviction import PolicyMaker, least_recently_used
from pasture.tiers.expiring import Expiring
from pasture.tiers.gate import CostGate, Gate
from pasture.tiers.guard import GuardLimits, MemoryGuard
from pasture.tiers.keys import root_key
from pasture.tiers.lifting import Readers
from pasture.tiers.memory import MemoryTier
from pasture.tiers.meter import Meter
from pasture.tiers.planning import leading_tokens
from pasture.tiers.ports import KeepsAccounts, SlowTier
from pasture.tiers.prefetch import Prefetcher
from pasture.tiers.trail import Trails
from pasture.tiers.upkeep import Upkeep
from pasture.tiers.writing import Writers

log = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0
"""for each kind of thread to end, and for the tiers to close"""


class Pins:
    """Several pins as one; see `core.storage.Pin`."""

    def __init__(self, pins: Sequence[Pin]) -> None:
        self._pins = pins

    def release(self) -> None:
        pins, self._pins = self._pins, ()
        for pin in pins:
            pin.release()


class TieredStore:
    """See the module and `core.storage.Store`. Made by `open_store`."""

    def __init__(
        self,
        codec: SlabCodec,
        memory: MemoryTier,
        gate: Gate,
        *,
        slow: Sequence[SlowTier] = (),
        squeezer: Squeezer | None = None,
        guard: MemoryGuard | None = None,
        prefetch: bool = True,
        expire_seconds: float | None = None,
        meter: Meter | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        """`memory` has a writer's line for each slow tier, fastest first. The store closes the tiers, fastest first."""
        self._codec = codec
        self._memory = memory
        self._gate = gate
        self._slow = slow
        self._accounts = tuple(tier for tier in slow if isinstance(tier, KeepsAccounts))
        self._clock = clock
        self._meter = meter or Meter()
        self._trails = Trails(codec.fingerprint)
        self._squeezer = squeezer or Squeezer(memory, codec, Compression.OFF, ())
        self._writers = Writers(memory, slow, gate, self._squeezer)
        self._readers = Readers(memory, slow, gate, clock) if slow else None
        self._prefetcher: Prefetcher | None = None
        if self._readers is not None:
            self._prefetcher = Prefetcher(memory, slow, gate, self._readers, guesses=prefetch, clock=clock)
            self._prefetcher.start()
        self._upkeep = Upkeep(memory, self._squeezer, guard=guard, readers=self._readers, clock=clock)
        self._upkeep.start()
        self._expiring: Expiring | None = None
        if expire_seconds is not None:
            self._expiring = Expiring(memory, slow, expire_seconds, clock)
            self._expiring.start()
        self._closed = False
        self._block_seconds = 0.0
        """to find and unpack one block, lately"""

    @property
    def persistent(self) -> bool:
        return bool(self._slow)

    # Engine thread

    def arrived(self, namespace: Namespace, tokens: array[int]) -> None:
        trail = self._trails.of(namespace, tokens)
        self._memory.arrived(trail)
        if self._prefetcher is not None:
            self._prefetcher.arrived(trail)

    def allow(self, namespace: Namespace, allowance: Allowance) -> None:
        owner = root_key(self._codec.fingerprint, namespace)
        self._memory.allow(owner, allowance)
        for tier in self._accounts:
            tier.allow(owner, allowance)

    def keep_for(self, seconds: Mapping[Namespace, float]) -> None:
        if self._expiring is not None:
            self._expiring.keep_for({root_key(self._codec.fingerprint, name): time for name, time in seconds.items()})

    def finished(self, namespace: Namespace, tokens: array[int], kind: Kind) -> None:
        trail = self._trails.of(namespace, tokens)
        self._memory.finished(trail, kind)
        if self._prefetcher is not None and kind is not Kind.BATCH:
            self._prefetcher.finished(trail)

    def prefetch(self, namespace: Namespace, tokens: array[int], ready: Callable[[], None]) -> None:
        if self._prefetcher is not None:
            self._prefetcher.hint(self._trails.of(namespace, tokens), ready)
        else:
            ready()

    def reach(self, namespace: Namespace, tokens: array[int]) -> int:
        return self._memory.reach(self._trails.of(namespace, tokens))

    def lift(self, namespace: Namespace, tokens: array[int], have: int, ready: Callable[[], None]) -> Lift | None:
        self._memory.count(missed_tokens=max(0, len(tokens) - have))
        if self._readers is None:
            return None
        return self._readers.lift(self._trails.fresh(namespace, tokens), have, ready)

    def take(self, namespace: Namespace, tokens: array[int], p0: int, p1: int) -> tuple[Slab, ...]:
        if p0 >= p1:
            return ()
        started = self._clock()
        blocks = self._memory.fetch(self._trails.of(namespace, tokens), p0, p1)
        stored: Counter[Form] = Counter()
        for block in blocks:
            stored[block.form] += block.n_bytes
        if blocks and not self._gate.fetch(p1 - p0, stored):
            return ()
        slabs: list[Slab] = []
        for block in blocks:
            slab = self._unpack(block)
            if slab is None:
                slabs = []
                break
            slabs.append(slab.cut(max(p0, slab.p0), min(p1, slab.p1)))
        if slabs:
            self._memory.count(hit_tokens=p1 - p0, read_bytes=stored.total())
            self._block_seconds += ((self._clock() - started) / len(slabs) - self._block_seconds) / 8
        else:
            self._memory.count(missed_tokens=p1 - p0)
        return tuple(slabs)

    def worth_saving(self, n_tokens: int) -> bool:
        return self._memory.budget_bytes > 0 and not self._gate.refuses_spill(n_tokens)

    def gap(self, namespace: Namespace, tokens: array[int], p0: int) -> int:
        if not tokens or (self._memory.divisible and p0 >= len(tokens)):
            return len(tokens)
        missing = self._memory.missing(self._trails.of(namespace, tokens), p0, len(tokens))
        if not missing:
            return len(tokens)
        start = missing[0].p0 if self._memory.divisible else 0
        return start if self._gate.spill(len(tokens) - start) else len(tokens)

    def put(self, namespace: Namespace, tokens: array[int], slab: Slab) -> None:
        kept = True
        for block in self._missing_blocks(namespace, tokens, slab):
            kept = kept and self._memory.insert(block)  # what follows one that is not kept could not be reached
            if not kept and not self._memory.pass_by(block):
                break
        self._written()

    def hold(self, namespace: Namespace, tokens: array[int], slab: Slab) -> Pin:
        head = self.pin(namespace, tokens[: slab.p1])  # what is there stays while room is made for the rest
        pins = [self._memory.insert_pinned(b) for b in self._missing_blocks(namespace, tokens, slab)]
        whole_path = self.pin(namespace, tokens[: slab.p1])
        self._written()
        return Pins([head, *pins, whole_path])

    def pin(self, namespace: Namespace, tokens: array[int]) -> Pin:
        return self._memory.pin(self._trails.of(namespace, tokens))

    def held_by_slow(self, namespace: Namespace, tokens: array[int]) -> Mapping[str, int]:
        trail = self._trails.fresh(namespace, tokens)
        return {tier.name: leading_tokens(tier, trail, divisible=self._memory.divisible) for tier in self._slow}

    def observe(self, transfers: Sequence[Transfer]) -> None:
        self._gate.observe(transfers)

    def observe_prefill(self, tokens_per_second: float) -> None:
        self._gate.observe_prefill(tokens_per_second)

    # Any thread

    def statistics(self) -> StoreStatistics:
        """The slow tiers' part is at most half a second old, unless a tier hangs."""
        figures = self._gate.figures()
        in_flight = self._squeezer.in_flight_bytes + self._writers.in_flight_bytes
        errors = self._upkeep.errors + self._writers.errors
        if self._readers is not None:
            in_flight += self._readers.in_flight_bytes
            errors += self._readers.errors
        if self._prefetcher is not None:
            errors += self._prefetcher.errors
        ram = self._memory.statistics(
            in_flight_bytes=in_flight,
            errors=errors,
            latency_seconds=self._block_seconds,
            bytes_per_second=figures.restore_bytes_per_second,
        )
        return StoreStatistics(
            tiers=(ram, *self._writers.tier_statistics),
            prefill_tokens_per_second=figures.prefill_tokens_per_second,
            save_bytes_per_second=figures.save_bytes_per_second,
            restore_bytes_per_second=figures.restore_bytes_per_second,
            gate_refusals=figures.refusals,
            prefetch=self._prefetcher.statistics() if self._prefetcher is not None else PrefetchStatistics(),
            policy_seconds=self._meter.seconds,
        )

    def flush(self, timeout_seconds: float) -> bool:
        return self._writers.flush(timeout_seconds)

    def close(self) -> None:
        """Within CLOSE_SECONDS for each kind of thread, whatever the tiers do. A tier that hangs is left behind, open."""
        if self._closed:
            return
        self._closed = True
        ended = [self._upkeep.stop(CLOSE_SECONDS), self._writers.stop(CLOSE_SECONDS)]
        if self._expiring is not None:
            ended.append(self._expiring.stop(CLOSE_SECONDS))
        if self._prefetcher is not None:
            ended.append(self._prefetcher.stop(CLOSE_SECONDS))
        if self._readers is not None:
            ended.append(self._readers.stop(CLOSE_SECONDS))
        if not all(ended):
            log.warning("a storage tier does not answer; it is not closed")
            return
        closing = threading.Thread(target=self._close_tiers, name="pasture-close", daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)

    # Inside

    def _missing_blocks(self, namespace: Namespace, tokens: array[int], slab: Slab) -> Iterator[Block]:
        """What of the slab is not stored, as blocks; what is counts as used."""
        if slab.p0 >= slab.p1:
            return
        trail = self._trails.of(namespace, tokens[: slab.p1])
        whole = not self._memory.divisible
        for address in self._memory.missing(trail, slab.p0, slab.p1, use=True):
            p0 = 0 if whole else address.p0
            if p0 < slab.p0:
                raise ValueError(f"a slab of [{slab.p0}, {slab.p1}) begins inside a block")
            payload = self._codec.pack(slab.cut(p0, address.p1))
            yield Block(address, tokens[address.p0 : address.p1], Form.RAW, payload, whole, trail.owner)

    def _written(self) -> None:
        self._writers.wake()

    def _unpack(self, block: Block) -> Slab | None:
        started = self._clock()
        address = block.address
        try:
            payload = inflate(block.payload) if block.form is Form.LOSSLESS else block.payload
            slab = self._codec.unpack(payload, 0 if block.whole else address.p0, address.p1)
        except EngineError as error:
            self._forget(block, error)
            return None
        self._gate.observe_unpack(block.form, block.n_bytes, self._clock() - started)
        return slab

    def _forget(self, block: Block, error: EngineError) -> None:
        """Drop it from every tier."""
        if not self._memory.statistics().damaged_blocks:
            log.warning("a stored block was refused and dropped; any other will only be counted: %s", error)
        self._memory.drop_damaged(block)
        self._writers.remove(block.address.key)

    def _close_tiers(self) -> None:
        for tier in self._slow:
            try:
                tier.close()
            except Exception:
                log.exception("a storage tier failed while it was closed")


def open_store(
    codec: SlabCodec,
    budget_bytes: int,
    *,
    divisible: bool,
    cell_bytes: int = 0,
    slow: Sequence[SlowTier] = (),
    compression: Compression = Compression.OFF,
    allowed: Collection[Form] = EVERY_FORM,
    available: Callable[[], int] | None = None,
    limits: GuardLimits | None = None,
    gate: Gate | None = None,
    policy: PolicyMaker = least_recently_used,
    prefetch: bool = True,
    expire_seconds: float | None = None,
    clock: Clock = time.perf_counter,
) -> TieredStore:
    """A store with its threads running.

    `divisible` and `cell_bytes`: `ModelInfo.shareable` and `.cell_bytes`. `slow`: fastest first. `allowed`: forms that the
    quality bound admits. `available`: bytes that the process can still take; with it, RAM shrinks where that falls below
    `limits`. `policy`: who leaves RAM first; its clock is its own. `prefetch`: whether slow tiers are read on a guess.
    `expire_seconds`: what nobody uses for so long is dropped; None: nothing is, whatever `keep_for` says.
    """
    meter = Meter()
    memory = MemoryTier(
        budget_bytes,
        divisible=divisible,
        policy=meter.around(policy),
        n_writers=len(slow),
        squeeze_stages=len(ladder(compression, allowed)),
    )
    return TieredStore(
        codec,
        memory,
        gate or CostGate(cell_bytes, clock=clock),
        slow=slow,
        squeezer=Squeezer(memory, codec, compression, allowed),
        guard=MemoryGuard(budget_bytes, available, limits) if available is not None else None,
        prefetch=prefetch,
        expire_seconds=expire_seconds,
        meter=meter,
        clock=clock,
    )
