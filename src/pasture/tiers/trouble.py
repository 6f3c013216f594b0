"""What a tier does about a device that fails: stop asking it for a while, and say so once.

`Circuit` opens at a failure, for a time that doubles with each further one; while it is open nothing is tried. `Complaints`
logs the first of each kind and then at most one a minute, with the number of those that were not logged. Both are shared by
the tier's threads. They know nothing of disks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Lock

FIRST_PAUSE_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 60.0
QUIET_SECONDS = 60.0
"""between two complaints of one kind"""


class Circuit:
    """Whether to try. `clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
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
            self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)

    def succeeded(self) -> None:
        """All is well again."""
        if self._open_until is not None:
            with self._lock:
                self._open_until = None
                self._pause_seconds = FIRST_PAUSE_SECONDS


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
