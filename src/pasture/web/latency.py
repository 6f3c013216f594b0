"""The times that clients felt in the last minute, for percentiles of now and not since the start.

Written once a token and read a few times a second, on the event loop: adding is two assignments into rings of fixed size. The
rings are plain numbers side by side, because a server that only a dashboard wakes finds nothing in the processor's caches: of
as many objects, half a second later, each would be fetched from memory.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np

from pasture.core.ports import Clock

WINDOW_SECONDS = 60.0
_AT_MOST = 4096
_SHARES = (0.5, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of `count` times, in seconds."""

    count: int
    p50: float
    p95: float
    p99: float


class Recent:
    """The last few thousand times, forgotten after a minute."""

    def __init__(self, clock: Clock, window_seconds: float = WINDOW_SECONDS) -> None:
        self._clock = clock
        self._window = window_seconds
        self._seconds = array("d", bytes(8 * _AT_MOST))
        self._added_at = array("d", [-np.inf]) * _AT_MOST
        self._next = 0

    def add(self, seconds: float) -> None:
        self._seconds[self._next] = seconds
        self._added_at[self._next] = self._clock()
        self._next = (self._next + 1) % _AT_MOST

    def percentiles(self) -> Percentiles | None:
        """None when there was nothing in the window."""
        since = self._clock() - self._window
        ordered = np.sort(np.frombuffer(self._seconds)[np.frombuffer(self._added_at) >= since])
        if not len(ordered):
            return None
        at = [min(len(ordered) - 1, int(share * len(ordered))) for share in _SHARES]
        return Percentiles(len(ordered), *map(float, ordered[at]))
