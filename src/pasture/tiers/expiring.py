"""What nobody has used for a long time is dropped, from RAM and from slow tiers: no KV outlives the conversations it is of.

Sessions and responses are forgotten by the state; their KV has no owner to ask, so it goes by time: a block that was not used
for `seconds`, and that nothing used hangs from. RAM counts uses in ticks, so a tick is noted every round, with its time. One
thread, which does next to nothing between two rounds.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence

from pasture.core.ports import Clock
from pasture.tiers.memory import MemoryTier
from pasture.tiers.ports import Expires, SlowTier

log = logging.getLogger(__name__)

LONGEST_ROUND_SECONDS = 60.0
ROUNDS = 8
"""in the time that a block is kept unused"""


class Expiring:
    """Owns the thread; `round` is what it does."""

    def __init__(self, memory: MemoryTier, slow: Sequence[SlowTier], seconds: float, clock: Clock) -> None:
        self._memory = memory
        self._slow = [tier for tier in slow if isinstance(tier, Expires)]
        self._seconds = seconds
        self._clock = clock
        self._ticks: deque[tuple[float, int]] = deque()
        """when which tick was the last"""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pasture-expiring", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_seconds: float) -> bool:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def round(self) -> int:
        """Drop what is due; returns how many blocks left RAM."""
        now = self._clock()
        self._ticks.append((now, self._memory.tick))
        due = None
        while self._ticks and now - self._ticks[0][0] >= self._seconds:
            due = self._ticks.popleft()[1]
        n_dropped = 0 if due is None else self._memory.drop_unused(due)
        for tier in self._slow:
            tier.expire(self._seconds)
        return n_dropped

    def _run(self) -> None:
        while not self._stopping.wait(min(LONGEST_ROUND_SECONDS, self._seconds / ROUNDS)):
            try:
                self.round()
            except Exception:
                log.exception("unused blocks could not be dropped this time")
