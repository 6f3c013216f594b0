"""Prefetch: conversations that are expected back rise from slow tiers into RAM before anybody asks for them.

    engine thread      finished: a conversation waits      arrived: it is back      hint: somebody says that it will be soon
    its own thread     a round: of those that wait and are not in RAM, who is expected soonest; block by block, while it may

It may only while no lift is under way (looked at before every block, so real work waits for one block at most), at no more than
a share of the slow tier's bandwidth, and while what came and is not used yet is at most a share of RAM. What was guessed enters
at the cold end and displaces only what the policy values less; with a policy that does not learn, nothing is guessed. What was
hinted at is pinned for a while. When a conversation is expected is the policy's business. Nothing raised leaves the thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import takewhile
from typing import Protocol

from pasture.core.ports import Clock
from pasture.core.storage import BLOCK_TOKENS, BlockKey, Pin, PrefetchStatistics
from pasture.tiers.block import Block
from pasture.tiers.gate import Gate, Rate
from pasture.tiers.lifting import is_asked_for
from pasture.tiers.memory import MemoryTier
from pasture.tiers.planning import Reading, plan
from pasture.tiers.ports import SlowTier
from pasture.tiers.trail import Trail

log = logging.getLogger(__name__)

ROUND_SECONDS = 0.25
RATE_FLOOR = 1 / 120
"""uses a second below which nobody is expected soon enough to be fetched for"""
UNUSED_SHARE = 0.5
"""of the RAM budget: what came ahead and is not used yet, at most"""
BANDWIDTH_SHARE = 0.25
"""of what the slow tiers read a second"""
USUAL_BYTES_PER_SECOND = 200e6
"""until it is measured"""
HINT_SECONDS = 60.0
"""for which what was hinted at stays pinned"""
LOOKED_AT = 64
"""conversations that one round considers; the others have their turn in the next"""
REMEMBERED_TOKENS = 1 << 22
"""in all conversations that wait; the longest waiting are forgotten"""
SHORTEST_WAIT_SECONDS = 1.0
"""before a conversation is looked at: until then it is in the live cache"""
RETRY_SHARE = 0.5
"""of the time it has waited: after a look that led to nothing, a conversation is let be for so long"""
READ_SECONDS = 2.0
"""for one batch, at most"""
REFUSED_SECONDS = 0.5
"""without guesses after one was worth less than all that is in RAM"""


class Work(Protocol):
    """What goes before everything here."""

    @property
    def busy(self) -> bool:
        """Whether somebody waits for a slow tier. Any thread."""
        ...


@dataclass(slots=True, eq=False)
class _Waiting:
    """A conversation between two requests."""

    trail: Trail
    since: float
    not_before: float
    """when it may be looked at next"""


class _Hint:
    """A conversation that somebody said will go on, and what keeps its blocks in RAM until then."""

    def __init__(self, trail: Trail, until: float, ready: Callable[[], None]) -> None:
        self.trail = trail
        self.until = until
        self.done = False
        self._ready = ready
        self._lock = threading.Lock()
        self._pins: list[Pin] = []
        self._released = False

    def keep(self, pin: Pin) -> None:
        with self._lock:
            if not self._released:
                self._pins.append(pin)
                return
        pin.release()

    def release(self) -> None:
        with self._lock:
            pins, self._pins, self._released = self._pins, [], True
        for pin in pins:
            pin.release()
        self.finish()

    def finish(self) -> None:
        """All that can be had is there, or nobody needs it any more; said once."""
        with self._lock:
            done, self.done = self.done, True
        if not done:
            self._ready()


class _End(Enum):
    """How lifting a conversation ended."""

    THERE = auto()
    """all that a slow tier has of it is in RAM"""
    NOTHING = auto()
    """no slow tier has more of it, or reading it does not pay"""
    REFUSED = auto()
    """what is in RAM is worth more"""
    STOPPED = auto()
    """real work came, or a budget is used up"""


class Prefetcher:
    """Owns the thread. `round` is what it does, for whoever wants it done at once."""

    def __init__(
        self,
        memory: MemoryTier,
        tiers: Sequence[SlowTier],
        gate: Gate,
        work: Work,
        *,
        guesses: bool = True,
        clock: Clock = time.perf_counter,
    ) -> None:
        """`guesses`: whether anything is lifted that nobody has hinted at."""
        self._memory = memory
        self._tiers = tiers
        self._gate = gate
        self._work = work
        self._guesses = guesses
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: OrderedDict[BlockKey, _Waiting] = OrderedDict()
        """last full block -> conversation, the longest unlooked at first"""
        self._tokens = 0
        self._hints: deque[_Hint] = deque()
        self._allowed_bytes = 0.0
        """that may be read now"""
        self._allowed_at = clock()
        self._guess_again_at = clock()
        self._rate = Rate(USUAL_BYTES_PER_SECOND)
        self._n_hints = self._n_guesses = self._n_cancelled = 0
        self._cpu_seconds = 0.0
        self.errors = 0
        self._stopped = threading.Event()
        self._wake = threading.Event()
        """set while anybody waits"""
        self._thread = threading.Thread(target=self._run, name="pasture-prefetch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    # Any thread

    def finished(self, trail: Trail) -> None:
        """A conversation has so far these tokens, and waits. The trail is walked to its end already, so it changes no more."""
        n_full = len(trail) // BLOCK_TOKENS
        if not n_full or not self._guesses:
            return
        now = self._clock()
        with self._lock:
            self._forget(trail[n_full - 1].key)
            self._waiting[trail[n_full - 1].key] = _Waiting(trail, now, now + SHORTEST_WAIT_SECONDS)
            self._tokens += len(trail)
            while self._tokens > REMEMBERED_TOKENS:
                self._forget(next(iter(self._waiting)))
        self._wake.set()

    def arrived(self, trail: Trail) -> None:
        """A request with this prompt is here: whatever it goes on from waits no more."""
        keys = [trail[index].key for index in range(len(trail) // BLOCK_TOKENS)]
        with self._lock:
            for key in keys:
                self._forget(key)
            back = set(keys)
            ended = [hint for hint in self._hints if _last_key(hint.trail) in back]
            for hint in ended:
                self._hints.remove(hint)
        for hint in ended:
            hint.release()

    def hint(self, trail: Trail, ready: Callable[[], None]) -> None:
        """Somebody will ask for what begins with these tokens. On the thread that walks the trail.

        `ready` is called once from some thread, when what can be had is in RAM, or the hint has lapsed.
        """
        if len(trail) < BLOCK_TOKENS or self._stopped.is_set():
            ready()
            return
        _ = trail[trail.n_blocks - 1]  # from here on two threads read it
        with self._lock:
            self._hints.append(_Hint(trail, self._clock() + HINT_SECONDS, ready))
            self._n_hints += 1
        self._wake.set()

    def statistics(self) -> PrefetchStatistics:
        aheads = self._memory.aheads
        return PrefetchStatistics(
            hints=self._n_hints,
            guesses=self._n_guesses,
            cancelled=self._n_cancelled,
            issued_blocks=aheads.issued_blocks,
            issued_bytes=aheads.issued_bytes,
            used_bytes=aheads.used_bytes,
            wasted_bytes=aheads.wasted_bytes,
            cpu_seconds=self._cpu_seconds,
        )

    def stop(self, timeout_seconds: float) -> bool:
        """End after the block that is being read; False when it is stuck in one."""
        self._stopped.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)
        with self._lock:
            hints = list(self._hints)
            self._hints.clear()
        for hint in hints:
            hint.release()
        return not self._thread.is_alive()

    # Its own thread

    def round(self) -> None:
        """Let old hints go; then lift for hints, then for the conversations that are expected soonest."""
        now = self._clock()
        self._expire(now)
        self._allow(now)
        with self._lock:
            hints = [hint for hint in self._hints if not hint.done]
        for hint in hints:
            if self._lift(hint.trail, hint) is _End.STOPPED:
                return
            hint.finish()
        if not self._guesses or now < self._guess_again_at:
            return
        for waiting in self._expected(now):
            end = self._lift(waiting.trail, None)
            if end is _End.REFUSED:  # whoever is expected later would be, too
                self._guess_again_at = now + REFUSED_SECONDS
            elif end is _End.NOTHING:
                waiting.not_before = now + RETRY_SHARE * (now - waiting.since)
                continue
            elif end is _End.THERE:
                self._n_guesses += 1
                continue
            return

    def _run(self) -> None:
        while not self._stopped.wait(ROUND_SECONDS):
            self._wake.wait()
            try:
                self.round()
            except Exception:
                self.errors += 1
                if self.errors == 1:
                    log.exception("prefetching failed; it goes on, and is counted from here on")
            with self._lock:
                if not self._waiting and not self._hints:
                    self._wake.clear()
            self._cpu_seconds = time.thread_time()

    def _expected(self, now: float) -> list[_Waiting]:
        """Of the next few that wait and are not in RAM, those that are expected, soonest first."""
        with self._lock:
            looked_at = list(self._waiting)[:LOOKED_AT]
            for key in looked_at:
                self._waiting.move_to_end(key)
            asked = [waiting for key in looked_at if (waiting := self._waiting[key]).not_before <= now]
        rates = self._memory.expected([waiting.trail for waiting in asked])
        found = [(rate, waiting) for rate, waiting in zip(rates, asked, strict=True) if rate >= RATE_FLOOR]
        return [waiting for _, waiting in sorted(found, key=lambda pair: -pair[0])]

    def _lift(self, trail: Trail, hint: _Hint | None) -> _End:
        """Read what RAM lacks, batch by batch."""
        if not self._may_go_on():
            return _End.STOPPED
        readings = plan(self._memory, self._tiers, self._gate, trail, self._memory.reach(trail))
        if hint is not None:
            hint.keep(self._memory.pin(trail))
        n_read = 0
        while n_read < len(readings):
            if not self._may_go_on():
                return _End.STOPPED
            batch = self._batch(readings[n_read:])
            blocks = self._read(batch)
            for block in blocks:
                if hint is not None:
                    hint.keep(self._memory.insert_pinned(block, source=batch[0].source, ahead=True))
                elif not self._memory.insert_ahead(block, source=batch[0].source):
                    return _End.REFUSED
            if len(blocks) < len(batch):
                return _End.NOTHING
            n_read += len(batch)
        return _End.THERE if readings else _End.NOTHING

    def _batch(self, readings: Sequence[Reading]) -> Sequence[Reading]:
        """So many of them, from the first, as their tier wants to be asked for at once."""
        tier = readings[0].tier
        most = max(1, tier.batch_bytes // max(1, self._gate.stored_bytes(BLOCK_TOKENS)))
        return list(takewhile(lambda reading: reading.tier is tier, readings[:most]))

    def _read(self, batch: Sequence[Reading]) -> list[Block]:
        """The batch's blocks, up to the first that did not come as it should."""
        tier, started = batch[0].tier, self._clock()
        found = zip(tier.get_batch([reading.address for reading in batch], READ_SECONDS), batch, strict=True)
        blocks = [block for block, _ in takewhile(_came, found) if block is not None]
        n_bytes, seconds = sum(block.n_bytes for block in blocks), self._clock() - started
        self._allowed_bytes -= n_bytes
        if blocks:
            self._rate.observe(n_bytes, seconds)
            self._gate.observe_read(tier.name, n_bytes, seconds)
        return blocks

    def _may_go_on(self) -> bool:
        if self._stopped.is_set() or self._allowed_bytes <= 0:
            return False
        if self._memory.aheads.unused_bytes > UNUSED_SHARE * self._memory.budget_bytes:
            return False
        if self._work.busy:
            self._n_cancelled += 1
            return False
        return True

    def _allow(self, now: float) -> None:
        """A bucket that holds a second's worth."""
        a_second = BANDWIDTH_SHARE * self._rate.per_second
        self._allowed_bytes = min(a_second, self._allowed_bytes + (now - self._allowed_at) * a_second)
        self._allowed_at = now

    def _expire(self, now: float) -> None:
        with self._lock:
            late = [hint for hint in self._hints if hint.until <= now]
            for hint in late:
                self._hints.remove(hint)
        for hint in late:
            hint.release()

    # The lock is held

    def _forget(self, key: BlockKey) -> None:
        waiting = self._waiting.pop(key, None)
        if waiting is not None:
            self._tokens -= len(waiting.trail)


def _last_key(trail: Trail) -> BlockKey:
    return trail[len(trail) // BLOCK_TOKENS - 1].key


def _came(pair: tuple[Block | None, Reading]) -> bool:
    block, reading = pair
    return block is not None and is_asked_for(block, reading)
