"""What is in flight: the prompt tokens that each replica has accepted and not yet computed.

Of its own requests a router knows every one; of those that came through other routers what the replica last reported, less what
was its own at that moment. A request's tokens are spread over `started`, `progress` and `finished`; what happens to a request
that is not known any more is ignored, so that a late report from a dead replica changes nothing. Pure; one thread.
"""

from __future__ import annotations

from dataclasses import dataclass

from pasture.cluster.values import Load, ReplicaId
from pasture.core.values import RequestId


@dataclass(slots=True)
class _InFlight:
    replica: ReplicaId
    uncached_tokens: int
    """left to compute"""


class Loads:
    def __init__(self) -> None:
        self._requests: dict[RequestId, _InFlight] = {}
        self._own: dict[ReplicaId, int] = {}
        self._others: dict[ReplicaId, int] = {}

    def of(self, replica: ReplicaId) -> int:
        """Uncached tokens in flight there; 0 for a stranger."""
        return self._own.get(replica, 0) + self._others.get(replica, 0)

    def started(self, request: RequestId, replica: ReplicaId, uncached_tokens: int) -> None:
        """It was sent there. One that was in flight elsewhere is not any more."""
        self.finished(request)
        self._requests[request] = _InFlight(replica, uncached_tokens)
        self._own[replica] = self._own.get(replica, 0) + uncached_tokens

    def progress(self, request: RequestId, uncached_tokens: int) -> None:
        """So many of its tokens are left to compute."""
        known = self._requests.get(request)
        if known is not None:
            self._own[known.replica] += uncached_tokens - known.uncached_tokens
            known.uncached_tokens = uncached_tokens

    def finished(self, request: RequestId) -> None:
        known = self._requests.pop(request, None)
        if known is not None:
            self._own[known.replica] -= known.uncached_tokens

    def reported(self, replica: ReplicaId, load: Load) -> None:
        """A replica's own count, which holds what every router has sent it."""
        self._others[replica] = max(0, load.uncached_tokens - self._own.get(replica, 0))

    def forget(self, replica: ReplicaId) -> None:
        """It has restarted or left; nothing is in flight there."""
        for request in [request for request, known in self._requests.items() if known.replica == replica]:
            del self._requests[request]
        self._own.pop(replica, None)
        self._others.pop(replica, None)
