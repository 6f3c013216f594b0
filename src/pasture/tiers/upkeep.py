"""What the store does between calls: the guard's budget, the watermarks, compression, and lifts that took too long.

One thread, which works at most half of the time, so that it leaves a core to whoever computes. Nothing raised here stops it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from pasture.core.ports import Clock
from pasture.tiers.compression import Squeezer
from pasture.tiers.guard import MemoryGuard, give_back_freed_memory
from pasture.tiers.lifting import Readers
from pasture.tiers.memory import MemoryTier

log = logging.getLogger(__name__)

ROUND_SECONDS = 0.25
LIFTING_SECONDS = 0.05
"""between two rounds while a lift is under way"""
SQUEEZE_SECONDS = 0.05
"""squeezing at a stretch"""
GIVE_BACK_BYTES = 64 << 20
GIVE_BACK_SHARE = 0.125
"""the system gets memory back when so many bytes and so much of the budget have left RAM since the last time; the C library
would keep most of it, and where blocks of many sizes come and go, what it keeps can grow to be as much as what is used"""


class Upkeep:
    """Owns the thread; `round` is what it does, for whoever wants it done at once."""

    def __init__(
        self,
        memory: MemoryTier,
        squeezer: Squeezer,
        *,
        guard: MemoryGuard | None,
        readers: Readers | None,
        clock: Clock,
        give_back: Callable[[], None] = give_back_freed_memory,
    ) -> None:
        self._memory = memory
        self._squeezer = squeezer
        self._guard = guard
        self._readers = readers
        self._clock = clock
        self._give_back = give_back
        self._gone_bytes = 0
        """that had left RAM when memory was given back last"""
        self._stopping = threading.Event()
        self.errors = 0
        self._thread = threading.Thread(target=self._run, name="pasture-upkeep", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_seconds: float) -> bool:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def round(self) -> float:
        """Look after everything once; returns the seconds until the next look."""
        lifting = self._readers is not None and self._readers.expire()
        self._make_room()
        started = self._clock()
        while self._squeezer.step():
            if self._clock() - started > SQUEEZE_SECONDS or self._stopping.is_set():
                return self._clock() - started
        return LIFTING_SECONDS if lifting else ROUND_SECONDS

    def _make_room(self) -> None:
        if self._guard is not None:
            budget = self._guard.budget(self._memory.used_bytes)
            if budget < self._memory.budget_bytes:
                self._memory.resize(budget)
                self._give_back()  # before the next look at what is free
            elif budget > self._memory.budget_bytes:
                self._memory.resize(budget)
        self._memory.trim()
        gone = self._memory.gone_bytes
        if gone - self._gone_bytes > max(GIVE_BACK_BYTES, GIVE_BACK_SHARE * self._memory.budget_bytes):
            self._gone_bytes = gone
            self._give_back()

    def _run(self) -> None:
        wait = 0.0
        while not self._stopping.wait(wait):
            try:
                wait = self.round()
            except Exception:
                self.errors += 1
                wait = ROUND_SECONDS
                if self.errors == 1:
                    log.exception("looking after the stored blocks failed; it goes on, and is counted from here on")
