"""Connections that hold a place and do nothing: closed when their request's head is overdue, or their answer is not taken.

uvicorn waits for the first request of a connection, and for the rest of a head that has begun, as long as the client likes;
only between requests it has a limit. And an answer that was handed to the socket whole lies in memory until the client takes
it. This looks at its connections every few seconds, from the event loop.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pasture.core.ports import Clock

HEAD_SECONDS = 30.0
STUCK_SECONDS = 60.0
"""for which a client may take nothing of an answer that waits for it"""


class Loiterers:
    """Remembers since when each connection owes a request, or has taken nothing."""

    def __init__(self, clock: Clock, seconds: float = HEAD_SECONDS, stuck_seconds: float = STUCK_SECONDS) -> None:
        self._clock = clock
        self._seconds = seconds
        self._stuck_seconds = stuck_seconds
        self._since: dict[Any, float] = {}
        self._unread: dict[Any, tuple[int, float]] = {}
        """connection -> (bytes that wait for it, since when none of them was taken)"""

    def sweep(self, connections: Collection[Any]) -> int:
        """Drop the connections (uvicorn's protocols) that have done nothing for too long; returns how many."""
        now = self._clock()
        self._since = {one: self._since.get(one, now) for one in connections if _owes(one)}
        self._unread = {one: self._waiting(one, size, now) for one in connections if (size := _unread_bytes(one))}
        overdue = {one for one, since in self._since.items() if now - since > self._seconds}
        overdue |= {one for one, (_, since) in self._unread.items() if now - since > self._stuck_seconds}
        for one in overdue:
            if one.transport is not None:
                one.transport.abort()
        return len(overdue)

    def _waiting(self, connection: Any, size: int, now: float) -> tuple[int, float]:
        before, since = self._unread.get(connection, (size + 1, now))
        return size, now if size < before else since


def _owes(connection: Any) -> bool:
    """Whether nothing is being answered, and uvicorn itself is not counting the time."""
    cycle = getattr(connection, "cycle", None)
    timed = getattr(connection, "timeout_keep_alive_task", None) is not None
    return not timed and (cycle is None or cycle.response_complete)


def _unread_bytes(connection: Any) -> int:
    return 0 if connection.transport is None else int(connection.transport.get_write_buffer_size())
