"""One remote store and whether it can be asked: threads, limits, breaker, and a watcher that looks after it.

    closed      it is asked; each question within its limit. A refused connection opens the breaker at once, late answers only
                when there are several in a row, because a busy machine is late now and then.
    open        it is not asked: nobody waits for it. The watcher probes it, at intervals that double up to a few seconds.
    half-open   the probe is under way. It has to be answered as fast as a question would have to be.

So an outage costs whoever notices it first one limit or two, and everybody else nothing. The watcher also asks a store that is
closed, once a second: most outages are noticed by it, and round-trip times are measured on it. One thread a store, and those
of `Calls`. Knows nothing of blocks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from pasture.core.ports import Clock
from pasture.core.storage import RemoteServerStatistics
from pasture.tiers.remote_calls import Calls, Pending, TooLate
from pasture.tiers.remote_ports import Shelf, ShelfFull, Usage
from pasture.tiers.trouble import Breaker, Circuit, Complaints

log = logging.getLogger(__name__)

T = TypeVar("T")

LOOKUP_SECONDS = 0.05
"""a question of which people wait for the answer, unless somebody says otherwise"""
WATCH_SECONDS = 1.0
TOLERATED = 1
"""late answers in a row before the store is left alone"""
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 3.0
FULL_SECONDS = 4.0
"""without writes, at most, after the store was full"""
ROUND_TRIPS = 128
"""remembered"""
SLICE_SECONDS = 0.05
"""between two looks at the breaker while an answer is awaited"""


class Asked(Generic[T]):
    """A question to one server; see `Server.ask`."""

    def __init__(self, server: Server, pending: Pending[T] | None) -> None:
        self._server = server
        self._pending = pending

    def answer(self, deadline: float, *, counts: bool = True) -> T | None:
        """The answer, or None where there is none by then; `deadline` is on the server's clock.

        `counts`: whether coming too late is a fault of the server; it is not where the time was too short to begin with.
        """
        return self._server.answer(self._pending, deadline, counts=counts) if self._pending is not None else None


class Server:
    """See the module. Owns the shelf, and opens it in the background."""

    def __init__(self, shelf: Shelf, *, lookup_seconds: float = LOOKUP_SECONDS, clock: Clock = time.monotonic) -> None:
        self.lookup_seconds = lookup_seconds
        self._shelf = shelf
        self._clock = clock
        self._calls = Calls(shelf.address)
        self._breaker = Breaker(
            clock, tolerated=TOLERATED, first_pause=FIRST_PAUSE_SECONDS, longest_pause=LONGEST_PAUSE_SECONDS
        )
        self._full = Circuit(clock, longest_pause_seconds=FULL_SECONDS)
        self._complaints = Complaints(log, clock)
        self._round_trips: deque[float] = deque(maxlen=ROUND_TRIPS)
        self._opening: Pending[None] | None = None
        self._opened = False
        self.usage = Usage()
        """as it was when the watcher looked last"""
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name=f"pasture-watch-{shelf.address}", daemon=True)
        self._watcher.start()

    # Any thread

    @property
    def address(self) -> str:
        return self._shelf.address

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(self._shelf.warnings)

    @property
    def answers(self) -> bool:
        """Whether it is worth asking."""
        return self._breaker.closed

    @property
    def accepts(self) -> bool:
        """Whether it is worth writing."""
        return self._breaker.closed and self._full.allows

    def ask(self, question: Callable[[Shelf], T]) -> Asked[T]:
        """Begin to ask; several servers can be asked at once. Nothing is begun while the breaker is open."""
        return Asked(self, self._calls.start(lambda: question(self._shelf)) if self.answers else None)

    def answer(self, pending: Pending[T], deadline: float, *, counts: bool = True) -> T | None:
        """Wait for it, while there is hope; what goes wrong is counted here."""
        while not pending.wait(min(SLICE_SECONDS, deadline - self._clock())):
            if self._clock() >= deadline or not self.answers:
                break
        try:
            result = pending.result()
        except ShelfFull as error:
            self._full.failed()
            self._breaker.succeeded()
            self._complaints.about("full", f"{self.address} has no room: {error}")
            return None
        except TooLate:
            if counts:
                self._failed("it did not answer in time", surely=False)
            return None
        except Exception as error:
            self._failed(_text_of(error), surely=True)
            return None
        self._breaker.succeeded()
        return result

    def wrote(self) -> None:
        """It had room."""
        self._full.succeeded()

    @property
    def round_trip_seconds(self) -> float:
        """The median of those measured lately; 0 before the first."""
        return _quantile(self._round_trips, 0.5)

    def statistics(self) -> RemoteServerStatistics:
        return RemoteServerStatistics(
            address=self.address,
            state=self._breaker.state.value,
            openings=self._breaker.openings,
            failures=self._breaker.failures,
            round_trip_seconds=self.round_trip_seconds,
            slow_round_trip_seconds=_quantile(self._round_trips, 0.99),
        )

    def close(self, timeout_seconds: float) -> None:
        """End the watcher and close the shelf, as far as they let themselves be closed in this time; once."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        deadline = self._clock() + timeout_seconds
        self._watcher.join(timeout_seconds)
        ended = self._calls.close(max(0.0, deadline - self._clock()))  # a library may fault where it is closed in mid-call
        if ended and self._opened and self.answers:  # and one that waits for a store that is away hold up more than itself
            closing = Calls(self.address)
            closing.start(self._shelf.close).wait(deadline - self._clock())
            closing.close(0.0)

    # The watcher

    def _watch(self) -> None:
        wait = 0.0
        while not self._stopping.wait(wait):
            wait = WATCH_SECONDS
            if not self._opened and not self._open():
                continue
            if self._breaker.closed or self._breaker.probe():
                self._ping()
                self._look()
            if not self._breaker.closed:
                wait = FIRST_PAUSE_SECONDS / 4

    def _open(self) -> bool:
        """Whether the shelf is open, for the first time; a library may take longer for that than anybody waits."""
        if self._opening is None:
            if not self._breaker.probe():
                return False
            self._opening = self._calls.start(self._shelf.open)
        if not self._opening.wait(WATCH_SECONDS):
            return False
        opening, self._opening = self._opening, None
        try:
            opening.result()
        except Exception as error:
            self._failed(_text_of(error), surely=True)
            return False
        self._opened = True
        for warning in self.warnings:
            log.warning("%s: %s", self.address, warning)
        self._ping()
        self._look()
        return True

    def _ping(self) -> None:
        started = self._clock()
        pending = self._calls.start(self._shelf.ping)
        pending.wait(self.lookup_seconds)
        try:
            pending.result()
        except TooLate:
            self._failed(f"it did not answer within {1e3 * self.lookup_seconds:.0f} ms", surely=False)
        except Exception as error:
            self._failed(_text_of(error), surely=True)
        else:
            self._round_trips.append(self._clock() - started)
            self._breaker.succeeded()

    def _look(self) -> None:
        if self._breaker.closed:
            pending = self._calls.start(self._shelf.usage)
            pending.wait(self.lookup_seconds)
            try:
                self.usage = pending.result()
            except Exception as error:  # the next ping will tell whether this means anything
                log.debug("%s does not say how full it is: %s", self.address, error)

    def _failed(self, what: str, *, surely: bool) -> None:
        if self._stopping.is_set():
            return
        was_closed = self._breaker.closed
        self._breaker.failed(surely=surely)
        if was_closed and not self._breaker.closed:
            self._complaints.about("away", f"the remote store {self.address} is left alone until it answers again: {what}")
        elif not self._opened:
            self._complaints.about("closed", f"the remote store {self.address} cannot be reached: {what}")


def _quantile(values: deque[float], share: float) -> float:
    ordered = sorted(values.copy())
    return ordered[int(share * (len(ordered) - 1))] if ordered else 0.0


def _text_of(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
