"""How fast a device answers, kept current: the latency of a small read and the bandwidth of a large one.

Begins with what was measured at start and follows each real read with an exponential average. What it has learnt fades with
a half-life (a minute, unless somebody says otherwise) back to the first figures: a device that was slow once and is therefore
not asked any more gets another chance. Any thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

SMALL_BYTES = 128 << 10
"""a read up to this size tells of latency, a larger one of bandwidth"""
WEIGHT = 0.2
"""of the newest read"""
HALF_LIFE_SECONDS = 60.0
SHORTEST_SECONDS = 1e-6


@dataclass(frozen=True, slots=True)
class Speed:
    latency_seconds: float
    bytes_per_second: float


class Pace:
    """`clock` is monotonic, in seconds."""

    def __init__(self, start: Speed, clock: Callable[[], float], *, half_life_seconds: float = HALF_LIFE_SECONDS) -> None:
        self._half_life_seconds = half_life_seconds
        self._start = start
        self._clock = clock
        self._lock = Lock()
        self._learnt = start
        self._learnt_at = clock()

    def observe(self, n_bytes: int, seconds: float) -> None:
        """A read of `n_bytes` took `seconds`, everything included."""
        seconds = max(seconds, SHORTEST_SECONDS)
        with self._lock:
            now = self._clock()
            speed = self._faded(now)
            if n_bytes <= SMALL_BYTES:
                speed = Speed(_mixed(speed.latency_seconds, seconds, WEIGHT), speed.bytes_per_second)
            else:
                moving = max(seconds - speed.latency_seconds, 0.1 * seconds)
                seconds_a_byte = _mixed(1.0 / speed.bytes_per_second, moving / n_bytes, WEIGHT)
                speed = Speed(speed.latency_seconds, 1.0 / seconds_a_byte)
            self._learnt, self._learnt_at = speed, now

    @property
    def speed(self) -> Speed:
        """What to expect of the next read."""
        with self._lock:
            return self._faded(self._clock())

    def _faded(self, now: float) -> Speed:
        forgotten = 1.0 - 0.5 ** (max(0.0, now - self._learnt_at) / self._half_life_seconds)
        latency = _mixed(self._learnt.latency_seconds, self._start.latency_seconds, forgotten)
        seconds_a_byte = _mixed(1.0 / self._learnt.bytes_per_second, 1.0 / self._start.bytes_per_second, forgotten)
        return Speed(latency, 1.0 / seconds_a_byte)


def _mixed(old: float, new: float, weight: float) -> float:
    return old + weight * (new - old)
