"""Fetching ahead: blocks come from slow tiers into RAM for a prompt that waits, from a pool of threads.

    engine thread      Readers.lift -> Lift          (an entry in a queue)
    a reader           plan: what follows, where it is, whether reading it beats computing it
    readers            read: each takes the next block, verifies it, puts it into RAM and pins it for the lift
    the last one       ready()

What came is pinned until the lift is released, and what is still to come has its room in the budget from the plan on, so that
lifts which begin together do not exceed it together: the last of them bring less. A block that is missing or not what it claims
ends the lift there: what lies behind it could not be used. A lift is over at the latest when recomputing would have been, so a
slow tier that hangs costs no more than its absence; while every reader is stuck, nothing is lifted at all. `ready` is called
exactly once, whatever happens.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from queue import SimpleQueue

from pasture.core.ports import Clock
from pasture.core.storage import BLOCK_TOKENS, Pin
from pasture.tiers.block import Block
from pasture.tiers.gate import Gate
from pasture.tiers.memory import MemoryTier
from pasture.tiers.planning import Reading, plan, within_room
from pasture.tiers.ports import SlowTier
from pasture.tiers.trail import Trail

log = logging.getLogger(__name__)

N_READERS = 4
SHORTEST_WAIT_SECONDS = 0.25
LONGEST_WAIT_SECONDS = 10.0
STUCK_SECONDS = 2.0
"""in one call to a slow tier, from which on a reader counts as lost until it comes back"""


class PromptLift:
    """One prompt's lift; see `core.storage.Lift`."""

    def __init__(self, trail: Trail, have: int, ready: Callable[[], None], pin: Pin, deadline: float) -> None:
        self.trail = trail
        self.have = have
        self.deadline = deadline
        self._ready = ready
        self._lock = threading.Lock()
        self._pins = [pin]
        self._readings: deque[Reading] | None = None
        """None: not planned yet"""
        self._n_reading = 0
        """batches that are under way"""
        self.coming_tokens = 0
        """in what is to be read or being read"""
        self._done = False
        self._released = False

    @property
    def done(self) -> bool:
        return self._done

    def release(self) -> None:
        with self._lock:
            pins, self._pins, self._released = self._pins, [], True
            self._read_no_more()
        for pin in pins:
            pin.release()

    # For the readers

    def begin(self, readings: Sequence[Reading]) -> None:
        with self._lock:
            self._readings = deque(() if self._released or self._done else readings)
            self.coming_tokens = _tokens_of(self._readings)

    @property
    def planned(self) -> bool:
        return self._readings is not None

    def next(self, batch_of: Callable[[SlowTier], int]) -> Sequence[Reading]:
        """What to read next, all from one tier and no more than belongs into one of its batches; empty at the end."""
        batch: list[Reading] = []
        with self._lock:
            while self._readings and (not batch or self._readings[0].tier is batch[0].tier):
                if batch and len(batch) >= batch_of(batch[0].tier):
                    break
                batch.append(self._readings.popleft())
            self._n_reading += bool(batch)
        return batch

    def came(self, batch: Sequence[Reading], pins: Sequence[Pin]) -> None:
        """A batch has ended with the first of its blocks in RAM; where that is not all of them, the chain ends there."""
        with self._lock:
            self._n_reading -= 1
            self.coming_tokens -= _tokens_of(batch)
            if len(pins) < len(batch):
                self._read_no_more()
            if not self._released:
                self._pins += pins
                pins = ()
        for pin in pins:
            pin.release()

    def finish_when_read(self) -> None:
        with self._lock:
            over = not self._readings and not self._n_reading
        if over:
            self.finish()

    def finish(self) -> None:
        """Say that it is over; once."""
        with self._lock:
            if self._done:
                return
            self._done = True
            self._read_no_more()
        try:
            self._ready()
        except Exception:
            log.exception("whoever waited for stored blocks failed when told of them")

    def _read_no_more(self) -> None:
        """The lock is held. What is being read still comes."""
        if self._readings is not None:
            self.coming_tokens -= _tokens_of(self._readings)
            self._readings.clear()


class Readers:
    """The pool of threads, and the lifts that are under way."""

    def __init__(self, memory: MemoryTier, tiers: Sequence[SlowTier], gate: Gate, clock: Clock) -> None:
        self._memory = memory
        self._tiers = tiers
        self._gate = gate
        self._clock = clock
        self._queue: SimpleQueue[PromptLift | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._lifts: set[PromptLift] = set()
        self._calls: dict[int, tuple[float, int]] = {}
        """reader -> when it began the call that it is in, and how many tokens' KV that brings"""
        self._closed = False
        self.errors = 0
        self._threads = [
            threading.Thread(target=self._run, args=(n,), name=f"pasture-read-{n}", daemon=True) for n in range(N_READERS)
        ]
        for thread in self._threads:
            thread.start()

    # Engine thread

    def lift(self, trail: Trail, have: int, ready: Callable[[], None]) -> PromptLift | None:
        """Queue it. None when it is pointless: nothing to look for, or nobody free to look."""
        if have >= len(trail) or self._stuck():
            return None
        recomputing = self._gate.recompute_seconds(len(trail) - have)
        wait = min(max(recomputing, SHORTEST_WAIT_SECONDS), LONGEST_WAIT_SECONDS)
        lift = PromptLift(trail, have, ready, self._memory.pin(trail), self._clock() + wait)
        with self._lock:
            if not self._closed:
                self._lifts.add(lift)
                self._queue.put(lift)
                return lift
        lift.release()
        return None

    @property
    def busy(self) -> bool:
        """Whether somebody waits for a lift. Any thread."""
        with self._lock:
            return any(not lift.done for lift in self._lifts)

    @property
    def in_flight_bytes(self) -> int:
        """What is being read at this moment, about."""
        return self._gate.stored_bytes(sum(n_tokens for _, n_tokens in list(self._calls.values())))

    # Background

    def expire(self) -> bool:
        """Finish the lifts whose time is over; True while others are under way."""
        now = self._clock()
        with self._lock:
            self._lifts = {lift for lift in self._lifts if not lift.done or lift.coming_tokens}
            under_way = [lift for lift in self._lifts if not lift.done]
        late = [lift for lift in under_way if lift.deadline <= now]
        for lift in late:
            lift.finish()
        return len(under_way) > len(late)

    def stop(self, timeout_seconds: float) -> bool:
        """Finish every lift and end the threads; False when one is stuck in a slow tier."""
        with self._lock:
            self._closed = True
            lifts = list(self._lifts)
        for _ in self._threads:
            self._queue.put(None)
        for lift in lifts:
            lift.finish()
        deadline = self._clock() + timeout_seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - self._clock()))
        return not any(thread.is_alive() for thread in self._threads)

    def _stuck(self) -> bool:
        now = self._clock()
        calls = list(self._calls.values())
        return len(calls) == len(self._threads) and all(now - started > STUCK_SECONDS for started, _ in calls)

    # The readers

    def _run(self, reader: int) -> None:
        while (lift := self._queue.get()) is not None:
            try:
                if not lift.planned:
                    self._plan(reader, lift)
                while batch := lift.next(self._batch_of):
                    pins: list[Pin] = []
                    try:
                        pins = self._read(reader, batch, lift.deadline)
                    finally:
                        lift.came(batch, pins)
                lift.finish_when_read()
            except Exception:
                self._failed()
                lift.finish()

    def _plan(self, reader: int, lift: PromptLift) -> None:
        if lift.done:
            lift.begin(())
            return
        self._calls[reader] = self._clock(), 0
        try:
            readings = plan(self._memory, self._tiers, self._gate, lift.trail, lift.have)
        except Exception:
            self._failed()
            readings = []
        finally:
            del self._calls[reader]
        with self._lock:  # of two that plan at the same time, one sees what the other takes
            readings = within_room(self._memory, self._gate, readings, sum(other.coming_tokens for other in self._lifts))
            lift.begin(readings)
        n_batches = sum(1 / self._batch_of(reading.tier) for reading in readings)
        for _ in range(min(math.ceil(n_batches), len(self._threads)) - 1):
            self._queue.put(lift)  # others help

    def _batch_of(self, tier: SlowTier) -> int:
        """Blocks in one batch."""
        return max(1, tier.batch_bytes // max(1, self._gate.stored_bytes(BLOCK_TOKENS)))

    def _read(self, reader: int, batch: Sequence[Reading], deadline: float) -> list[Pin]:
        """The batch's blocks in RAM, up to the first that did not come as it should."""
        tier = batch[0].tier
        started = self._clock()
        self._calls[reader] = started, _tokens_of(batch)
        try:
            blocks = tier.get_batch([reading.address for reading in batch], max(0.0, deadline - started))
        except Exception:
            self._failed()
            return []
        finally:
            del self._calls[reader]
        good: list[Block] = []
        for block, reading in zip(blocks, batch, strict=True):
            if block is None or not is_asked_for(block, reading):
                break
            good.append(block)
        if good:
            self._gate.observe_read(tier.name, sum(block.n_bytes for block in good), self._clock() - started)
        return [self._memory.insert_pinned(block, source=batch[0].source) for block in good]

    def _failed(self) -> None:
        self.errors += 1
        if self.errors == 1:
            log.exception("a slow tier failed where it should not; it is counted from here on")


def _tokens_of(readings: Iterable[Reading]) -> int:
    return sum(reading.n_tokens for reading in readings)


def is_asked_for(block: Block, reading: Reading) -> bool:
    """A hash finds, tokens confirm."""
    return block.address == reading.address and block.tokens == reading.tokens and block.whole is reading.whole
