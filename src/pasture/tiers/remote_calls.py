"""Calls that may hang, in threads that may be lost with them: whoever asks waits as long as he wants to, and no longer.

`Calls` starts a thread when there is none free, up to a number; one that is stuck in a library comes back when the library
lets it go. The threads are daemons, so that a process can end whatever its libraries do. A call that nobody waits for any more
is not begun. Knows nothing of stores. Any thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

MAX_THREADS = 16
"""a store that hangs for half a minute a call, asked every two seconds, keeps as many"""
IDLE_SECONDS = 30.0
"""after which a thread without work ends"""


class TooLate(Exception):
    """The answer did not come in time, or there was nobody to ask for it."""


class Pending(Generic[T]):
    """An answer that is on its way."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._given_up = False
        self._result: list[T] = []
        self._error: BaseException | None = None

    def wait(self, timeout_seconds: float) -> bool:
        """Whether it is here; does not give up."""
        return self._done.wait(max(0.0, timeout_seconds))

    def result(self) -> T:
        """The answer, or what was raised instead; gives up where there is none yet. Raises TooLate then."""
        with self._lock:
            if not self._done.is_set():
                self._given_up = True
                raise TooLate("no answer in time")
        if self._error is not None:
            raise self._error
        [result] = self._result
        return result

    def run(self) -> None:
        """Do it, in whatever thread this is; not at all where nobody waits."""
        with self._lock:
            if self._given_up:
                return
        try:
            self._result = [self._work()]
        except Exception as error:
            self._error = error
        self._done.set()


class Calls:
    """The threads for one store."""

    def __init__(self, name: str, max_threads: int = MAX_THREADS) -> None:
        self._name = name
        self._max_threads = max_threads
        self._changed = threading.Condition()
        self._waiting: deque[Pending[object]] = deque()
        self._n_threads = 0
        self._n_idle = 0
        self._closed = False

    @property
    def n_threads(self) -> int:
        return self._n_threads

    def start(self, work: Callable[[], T]) -> Pending[T]:
        """Begin it as soon as a thread is free."""
        pending: Pending[T] = Pending(work)
        with self._changed:
            if self._closed:
                return pending
            self._waiting.append(pending)  # type: ignore[arg-type]  # its result is nothing to the threads
            if self._n_idle >= len(self._waiting):
                self._changed.notify()
            elif self._n_threads < self._max_threads:
                self._n_threads += 1
                threading.Thread(target=self._run, name=f"pasture-call-{self._name}", daemon=True).start()
        return pending

    def close(self, timeout_seconds: float) -> bool:
        """Begin nothing more, and let the threads end when what they do lets them; whether all have, in this time."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._n_threads == 0, timeout_seconds)

    def _run(self) -> None:
        while (pending := self._next()) is not None:
            pending.run()
            del pending  # and what it has brought, which may be large

    def _next(self) -> Pending[object] | None:
        with self._changed:
            self._n_idle += 1
            self._changed.wait_for(lambda: self._closed or bool(self._waiting), IDLE_SECONDS)
            self._n_idle -= 1
            if self._waiting:
                return self._waiting.popleft()
            self._n_threads -= 1
            self._changed.notify_all()
            return None
