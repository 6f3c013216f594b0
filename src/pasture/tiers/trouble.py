"""What a tier does about a device or a store that fails: stop asking it for a while, and say so once.

`Circuit` opens at a failure, for a time that doubles with each further one; while it is open nothing is tried. `Breaker` is one
that does not try with what people wait for: it stays open until a probe has been answered. `Complaints` logs the first of each
kind and then at most one a minute, with the number of those that were not logged. All are shared by the tier's threads. They
know nothing of disks and networks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import StrEnum
from threading import Lock

FIRST_PAUSE_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 60.0
QUIET_SECONDS = 60.0
"""between two complaints of one kind"""


class Circuit:
    """Whether to try. `clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float], *, longest_pause_seconds: float = LONGEST_PAUSE_SECONDS) -> None:
        self._clock = clock
        self._longest_pause_seconds = longest_pause_seconds
        self._lock = Lock()
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._open_until: float | None = None

    @property
    def allows(self) -> bool:
        """False for some seconds after a failure."""
        open_until = self._open_until
        return open_until is None or self._clock() >= open_until

    def failed(self) -> None:
        """Pause; failures of what was under way already when the pause began do not lengthen it."""
        with self._lock:
            now = self._clock()
            if self._open_until is not None and now < self._open_until:
                return
            self._open_until = now + self._pause_seconds
            self._pause_seconds = min(2 * self._pause_seconds, self._longest_pause_seconds)

    def succeeded(self) -> None:
        """All is well again."""
        if self._open_until is not None:
            with self._lock:
                self._open_until = None
                self._pause_seconds = FIRST_PAUSE_SECONDS


class BreakerState(StrEnum):
    CLOSED = "closed"
    """asked"""
    OPEN = "open"
    """left alone"""
    HALF_OPEN = "half-open"
    """a probe is under way"""


class Breaker:
    """Open from the start and after failures, until a probe succeeds. `clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float], *, tolerated: int, first_pause: float, longest_pause: float) -> None:
        """`tolerated`: failures in a row that do not open it. The pauses between two probes double, in seconds."""
        self._clock = clock
        self._tolerated = tolerated
        self._first_pause = first_pause
        self._longest_pause = longest_pause
        self._lock = Lock()
        self._state = BreakerState.OPEN
        self._pause = first_pause
        self._next_probe = clock()
        self._in_a_row = 0
        self.failures = 0
        self.openings = 0
        """times that it opened after it was closed"""

    @property
    def state(self) -> BreakerState:
        return self._state

    @property
    def closed(self) -> bool:
        return self._state is BreakerState.CLOSED

    def failed(self, *, surely: bool) -> None:
        """A call did not succeed. `surely`: there is no doubt that further ones would not either."""
        with self._lock:
            self.failures += 1
            self._in_a_row += 1
            if self._state is BreakerState.CLOSED and (surely or self._in_a_row > self._tolerated):
                self.openings += 1
                self._state = BreakerState.OPEN
                self._next_probe = self._clock() + self._pause
            elif self._state is BreakerState.HALF_OPEN:
                self._state = BreakerState.OPEN
                self._pause = min(2 * self._pause, self._longest_pause)
                self._next_probe = self._clock() + self._pause

    def succeeded(self) -> None:
        """A call or a probe was answered; what was asked before the breaker opened proves nothing."""
        with self._lock:
            if self._state is not BreakerState.OPEN:
                self._state = BreakerState.CLOSED
                self._pause = self._first_pause
                self._in_a_row = 0

    def probe(self) -> bool:
        """Whether to probe now; then it is half open until that probe `failed` or `succeeded`."""
        with self._lock:
            if self._state is not BreakerState.OPEN or self._clock() < self._next_probe:
                return False
            self._state = BreakerState.HALF_OPEN
            return True


class Complaints:
    """One warning a kind and minute. `clock` is monotonic, in seconds."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float]) -> None:
        self._log = log
        self._clock = clock
        self._lock = Lock()
        self._said: dict[str, float] = {}
        self._unsaid: dict[str, int] = {}

    def about(self, kind: str, message: str) -> None:
        """Warn, unless that was done lately; `kind` is one of a few words, never something a file contains."""
        with self._lock:
            now = self._clock()
            said = self._said.get(kind)
            if said is not None and now - said < QUIET_SECONDS:
                self._unsaid[kind] = self._unsaid.get(kind, 0) + 1
                return
            self._said[kind] = now
            unsaid = self._unsaid.pop(kind, 0)
        self._log.warning("%s%s", message, f" (and {unsaid} more like this)" if unsaid else "")
