"""What nobody has used for a long time is dropped, from RAM and from slow tiers: no KV outlives the conversations it is of.

Sessions and responses are forgotten by the state; their KV, which several may share, goes by time: a block that was not used
for `seconds`, or for its owner's own time, and that nothing used hangs from. What is pinned in RAM counts as used everywhere.
RAM counts uses in ticks, so ticks are noted with their times, finely enough for each of the times. One thread, which does next
to nothing between two rounds, and nothing before it has heard once who has a time of their own.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from pasture.core.ports import Clock
from pasture.core.storage import BlockKey
from pasture.tiers.memory import MemoryTier
from pasture.tiers.ports import Expires, SlowTier

log = logging.getLogger(__name__)

SHORTEST_ROUND_SECONDS, LONGEST_ROUND_SECONDS = 1.0, 60.0
NOTES = 64
"""in the time that a block is kept unused: it may stay a 64th longer"""


class _History:
    """Which tick was the last when, as far back as `seconds`, no finer than it takes."""

    def __init__(self, seconds: float, noted: Iterable[tuple[float, int]] = ()) -> None:
        self.every_seconds = max(SHORTEST_ROUND_SECONDS, seconds / NOTES)
        """between two notes"""
        self._seconds = seconds
        self.noted = deque(noted)
        self._due: int | None = None

    def due(self, now: float, tick: int) -> int | None:
        """The tick that was the last `seconds` ago; None where none was noted then. `tick` is the last one now."""
        if not self.noted or now - self.noted[-1][0] >= self.every_seconds:
            self.noted.append((now, tick))
        while self.noted and now - self.noted[0][0] >= self._seconds:
            self._due = self.noted.popleft()[1]
        return self._due


class Expiring:
    """Owns the thread; `round` is what it does."""

    def __init__(self, memory: MemoryTier, slow: Sequence[SlowTier], seconds: float, clock: Clock) -> None:
        self._memory = memory
        self._slow = [tier for tier in slow if isinstance(tier, Expires)]
        self._seconds = seconds
        self._clock = clock
        self._own: Mapping[BlockKey, float] | None = None
        self._histories = {seconds: _History(seconds)}
        """by the times that anything is kept for; the thread's"""
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="pasture-expiring", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def keep_for(self, seconds: Mapping[BlockKey, float]) -> None:
        """How long blocks of these owners are kept unused, all that differ. Any thread; looks at once whether some are due."""
        if seconds != self._own:
            self._own = dict(seconds)
            self._wake.set()

    def stop(self, timeout_seconds: float) -> bool:
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def round(self) -> int:
        """Drop what is due; returns how many blocks left RAM."""
        own = self._own or {}
        self._histories = {seconds: self._history(seconds) for seconds in (self._seconds, *own.values())}
        now, tick = self._clock(), self._memory.tick
        due = {seconds: history.due(now, tick) for seconds, history in self._histories.items()}
        n_dropped = self._memory.drop_unused(due[self._seconds], {owner: due[seconds] for owner, seconds in own.items()})
        in_use = self._memory.pinned_keys() if self._slow else ()
        for tier in self._slow:
            tier.expire(self._seconds, own, in_use)
        return n_dropped

    def _history(self, seconds: float) -> _History:
        """A time that is new begins with what was noted for the usual one."""
        return self._histories.get(seconds) or _History(seconds, self._histories[self._seconds].noted)

    def _run(self) -> None:
        while True:
            self._wake.wait(min(LONGEST_ROUND_SECONDS, *(history.every_seconds for history in self._histories.values())))
            self._wake.clear()
            if self._stopping:
                return
            if self._own is None:
                continue
            try:
                self.round()
            except Exception:
                log.exception("unused blocks could not be dropped this time")
