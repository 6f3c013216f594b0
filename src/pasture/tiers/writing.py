"""Write-behind: what is new in RAM goes to the slow tiers, from a thread of its own.

The line of what is to be written consists of keys of blocks in RAM, so it costs no memory, needs no limit, and a block that is
evicted before its turn is dropped rather than waited for. Parents come before children. A longer block that took a shorter
one's place takes it in the slow tiers too, once it is there itself. Where the gate says that reading back would lose, nothing
is written.

A slow tier that hangs stops this thread and nothing else. Nothing raised in a tier leaves this thread.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from pasture.core.storage import BlockKey, TierStatistics
from pasture.tiers.block import Block
from pasture.tiers.gate import Gate
from pasture.tiers.memory import MemoryTier, Unwritten
from pasture.tiers.ports import SlowTier

log = logging.getLogger(__name__)

T = TypeVar("T")

PICTURE_SECONDS = 0.5
"""between two looks at the tiers' own statistics"""


class Writer:
    """Owns the thread that writes; `tier_statistics` is the last picture it took of each tier."""

    def __init__(self, memory: MemoryTier, tiers: Sequence[SlowTier], gate: Gate) -> None:
        self._memory = memory
        self._tiers = tiers
        self._gate = gate
        self._removals: deque[BlockKey] = deque()
        self._wake = threading.Event()
        self._settled = threading.Condition()
        self._rounds = 0
        """times that nothing was left to write"""
        self._stopping = False
        self.errors = 0
        self.in_flight_bytes = 0
        """of the block that is being written now"""
        self.tier_statistics: tuple[TierStatistics, ...] = ()
        self._thread = threading.Thread(target=self._run, name="pasture-write", daemon=True)
        self._thread.start()

    # Any thread

    def wake(self) -> None:
        """There is something new in RAM."""
        self._wake.set()

    def remove(self, key: BlockKey) -> None:
        """The slow tiers' block of this key is of no use."""
        self._removals.append(key)
        self._wake.set()

    def flush(self, timeout_seconds: float) -> bool:
        """Wait until everything listed so far is written; False when time ran out."""
        with self._settled:
            seen = self._rounds
            self._wake.set()
            return self._settled.wait_for(lambda: self._rounds > seen, timeout_seconds)

    def stop(self, timeout_seconds: float) -> bool:
        """End after the block that is being written; False when it is stuck in one."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    # Its own thread

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait(PICTURE_SECONDS)
            self._wake.clear()
            self._drain()
            self._picture()
            with self._settled:  # looked at under the lock: whoever put something and then asks is not answered too early
                if not self._memory.unwritten_blocks and not self._removals:
                    self._rounds += 1
                    self._settled.notify_all()

    def _drain(self) -> None:
        while not self._stopping and (item := self._memory.next_unwritten()) is not None:
            self._write(item)
            while self._removals:
                self._remove(self._removals.popleft())
        while not self._stopping and self._removals:
            self._remove(self._removals.popleft())

    def _write(self, item: Unwritten) -> None:
        block = item.block
        self.in_flight_bytes = block.n_bytes
        for tier in self._tiers:
            if self._gate.spill_slow(tier.name, _tokens_of(block), block.n_bytes):
                self._try(tier.put, block)
        self.in_flight_bytes = 0
        for key in item.supersedes:
            self._remove(key)

    def _remove(self, key: BlockKey) -> None:
        for tier in self._tiers:
            self._try(tier.remove, key)

    def _try(self, call: Callable[[T], None], argument: T) -> None:
        """Tiers promise not to raise; one that does is broken, which is its own trouble alone."""
        try:
            call(argument)
        except Exception:
            self.errors += 1
            if self.errors == 1:
                log.exception("a slow tier failed where it should not; it is counted from here on")

    def _picture(self) -> None:
        try:
            pictures = tuple(tier.statistics() for tier in self._tiers)
        except Exception:
            self.errors += 1
            return
        for picture in pictures:
            self._gate.describe_tier(picture.name, picture.latency_seconds, picture.bytes_per_second)
        self.tier_statistics = pictures


def _tokens_of(block: Block) -> int:
    """Tokens that would have to be recomputed without this block."""
    return block.address.p1 if block.whole else len(block.tokens)
