"""Write-behind: what is new in RAM goes to a slow tier, from a thread of its own for each tier.

What waits is a line of blocks in RAM (`unwritten`), so it costs no memory, needs no limit, and a block that is evicted before
its turn is dropped rather than waited for. Parents come before children. A longer block that took a shorter one's place takes
it in the slow tier too, if and when it is there itself. Where the gate says that reading back would lose, nothing is written.
While a tier takes nothing, its line waits; what it did not take is offered again after a while, but not for ever. Others may
overtake it meanwhile, since a tier can be full for some blocks and not for others: one of several servers is.

Where all that is stored has one form, a block takes it before it is written.

A slow tier that hangs stops its own thread and nothing else. Nothing raised in a tier leaves this thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence

from pasture.core.storage import BlockKey, TierStatistics
from pasture.tiers.block import Block
from pasture.tiers.compression import Squeezer
from pasture.tiers.gate import Gate
from pasture.tiers.memory import MemoryTier
from pasture.tiers.ports import SlowTier
from pasture.tiers.unwritten import Unwritten

log = logging.getLogger(__name__)

PICTURE_SECONDS = 0.5
"""between two looks at the tier's own statistics"""
MAX_REMOVALS = 1 << 16
"""remembered while a tier takes nothing; what is forgotten only takes room there until the tier evicts it"""
AGAIN_SECONDS = 0.5
"""before a tier is asked again to take what it did not take"""
MAX_OFFERS = 10
"""of one block: then it is the block that is at fault"""


class Writer:
    """Owns the thread that writes to one tier; `tier_statistics` is the last picture it took of it, None before the first."""

    def __init__(self, memory: MemoryTier, number: int, tier: SlowTier, gate: Gate, squeezer: Squeezer) -> None:
        """`number`: of the tier among the slow ones, fastest first."""
        self._memory = memory
        self._number = number
        self._tier = tier
        self._gate = gate
        self._squeezer = squeezer
        self._removals: deque[BlockKey] = deque(maxlen=MAX_REMOVALS)
        self._wake = threading.Event()
        self._settled = threading.Condition()
        self._rounds = 0
        """times that nothing was left to write"""
        self._stopping = False
        self._again_at: float | None = None
        """when refused blocks are offered again; None while there are none"""
        self.errors = 0
        self.in_flight_bytes = 0
        """of the block that is being squeezed or written now"""
        self.tier_statistics: TierStatistics | None = None
        self._thread = threading.Thread(target=self._run, name=f"pasture-write-{tier.name}", daemon=True)
        self._thread.start()

    # Any thread

    def wake(self) -> None:
        """There is something new in RAM."""
        self._wake.set()

    def remove(self, key: BlockKey) -> None:
        """The tier's block of this key is of no use."""
        self._removals.append(key)
        self._wake.set()

    def flush(self, timeout_seconds: float) -> bool:
        """Wait until everything listed so far is written; False when time ran out, or the tier takes nothing."""
        with self._settled:
            seen = self._rounds
            self._wake.set()
            self._settled.wait_for(lambda: self._rounds > seen or self._shut(), timeout_seconds)
            return self._rounds > seen or not self._memory.unwritten_blocks(self._number)

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
            if self._again_at is not None and time.monotonic() >= self._again_at and self._memory.offer_again(self._number):
                self._again_at = None
            self._drain()
            self._picture()
            with self._settled:  # looked at under the lock: whoever put something and then asks is not answered too early
                if not self._memory.unwritten_blocks(self._number) and not self._removals:
                    self._rounds += 1
                self._settled.notify_all()

    def _drain(self) -> None:
        while not self._stopping and not self._shut():
            while self._removals:
                self._remove(self._removals.popleft())
            item = self._memory.next_unwritten(self._number)
            if item is None:
                return
            self._write(item)

    def _write(self, item: Unwritten) -> None:
        self.in_flight_bytes = item.block.n_bytes
        try:
            block = self._squeezer.at_rest(item.block)
            if not self._gate.spill_slow(self._tier.name, _tokens_of(block), block.n_bytes):
                return
            taken = self._put(block)
        finally:
            self.in_flight_bytes = 0
        if taken:
            for key in item.supersedes:
                self._remove(key)
        elif item.refusals + 1 < MAX_OFFERS:
            self._memory.put_back(self._number, item)
            if self._again_at is None:
                self._again_at = time.monotonic() + AGAIN_SECONDS

    def _put(self, block: Block) -> bool:
        """Tiers promise not to raise; one that does is broken, which is its own trouble alone."""
        try:
            return self._tier.put(block)
        except Exception:
            self._failed()
            return False

    def _remove(self, key: BlockKey) -> None:
        try:
            self._tier.remove(key)
        except Exception:
            self._failed()

    def _shut(self) -> bool:
        try:
            return not self._tier.accepts
        except Exception:
            self._failed()
            return True

    def _failed(self) -> None:
        self.errors += 1
        if self.errors == 1:
            log.exception("a slow tier failed where it should not; it is counted from here on")

    def _picture(self) -> None:
        try:
            picture = self._tier.statistics()
        except Exception:
            self.errors += 1
            return
        self._gate.describe_tier(picture.name, picture.latency_seconds, picture.bytes_per_second)
        self.tier_statistics = picture


class Writers:
    """One for each tier, fastest first."""

    def __init__(self, memory: MemoryTier, tiers: Sequence[SlowTier], gate: Gate, squeezer: Squeezer) -> None:
        self._writers = tuple(Writer(memory, number, tier, gate, squeezer) for number, tier in enumerate(tiers))

    @property
    def errors(self) -> int:
        return sum(writer.errors for writer in self._writers)

    @property
    def in_flight_bytes(self) -> int:
        return sum(writer.in_flight_bytes for writer in self._writers)

    @property
    def tier_statistics(self) -> tuple[TierStatistics, ...]:
        """Of each tier of which there is a picture."""
        return tuple(writer.tier_statistics for writer in self._writers if writer.tier_statistics is not None)

    def wake(self) -> None:
        for writer in self._writers:
            writer.wake()

    def remove(self, key: BlockKey) -> None:
        """No tier's block of this key is of any use."""
        for writer in self._writers:
            writer.remove(key)

    def flush(self, timeout_seconds: float) -> bool:
        """Within this time for all of them; see `Writer.flush`."""
        deadline = time.monotonic() + timeout_seconds
        written = [writer.flush(max(0.0, deadline - time.monotonic())) for writer in self._writers]
        return all(written)

    def stop(self, timeout_seconds: float) -> bool:
        deadline = time.monotonic() + timeout_seconds
        ended = [writer.stop(max(0.0, deadline - time.monotonic())) for writer in self._writers]
        return all(ended)


def _tokens_of(block: Block) -> int:
    """Tokens that would have to be recomputed without this block."""
    return block.address.p1 if block.whole else len(block.tokens)
