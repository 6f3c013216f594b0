"""The times that clients felt in the last minute, for percentiles of now and not since the start.

Written once a token and read a few times a second, on the event loop: adding is two assignments into a ring of fixed size.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from pasture.core.ports import Clock

WINDOW_SECONDS = 60.0
_AT_MOST = 4096


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
        self._times: deque[tuple[float, float]] = deque(maxlen=_AT_MOST)

    def add(self, seconds: float) -> None:
        self._times.append((self._clock(), seconds))

    def percentiles(self) -> Percentiles | None:
        """None when there was nothing in the window. Forgets what is older."""
        since = self._clock() - self._window
        while self._times and self._times[0][0] < since:
            self._times.popleft()
        if not self._times:
            return None
        ordered = sorted(seconds for _, seconds in self._times)
        return Percentiles(len(ordered), *(_at(ordered, share) for share in (0.5, 0.95, 0.99)))


def _at(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
