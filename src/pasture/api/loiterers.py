"""Connections that hold a place and send nothing: closed when their request's head is overdue.

uvicorn waits for the first request of a connection, and for the rest of a head that has begun, as long as the client likes;
only between requests it has a limit. This looks at its connections every few seconds, from the event loop.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pasture.core.ports import Clock

HEAD_SECONDS = 30.0


class Loiterers:
    """Remembers since when each connection owes a request."""

    def __init__(self, clock: Clock, seconds: float = HEAD_SECONDS) -> None:
        self._clock = clock
        self._seconds = seconds
        self._since: dict[Any, float] = {}

    def sweep(self, connections: Collection[Any]) -> int:
        """Drop the connections (uvicorn's protocols) that have owed a request for too long; returns how many."""
        now = self._clock()
        self._since = {one: self._since.get(one, now) for one in connections if _owes(one)}
        overdue = [one for one, since in self._since.items() if now - since > self._seconds]
        for one in overdue:
            if one.transport is not None:
                one.transport.abort()
        return len(overdue)


def _owes(connection: Any) -> bool:
    """Whether nothing is being answered, and uvicorn itself is not counting the time."""
    cycle = getattr(connection, "cycle", None)
    timed = getattr(connection, "timeout_keep_alive_task", None) is not None
    return not timed and (cycle is None or cycle.response_complete)
