"""Every error pasture raises on purpose.

    PastureError
    ├── ConfigError             a setting that cannot be used; the message says what to change
    ├── ModelError              the model file cannot be loaded or used
    │   └── DoesNotFit          the pool or the model is larger than the memory that is free
    ├── RequestError            the client's request cannot be served as it stands
    │   ├── PromptTooLong       more tokens than one conversation can hold
    │   ├── QueueFull           the waiting line is full; try again later
    │   │   └── RateLimited     the tenant's own limit is reached; try again later
    │   ├── NotFound            there is no such thing, or it is somebody else's: nobody can tell which
    │   ├── Conflict            the thing is in use, or is not what the request takes it for
    │   ├── Forbidden           the key does not open this
    │   ├── DeadlineExceeded    the request's own time limit passed
    │   ├── ShuttingDown        the server is draining
    │   └── NoReplica           of several machines none can take it now; try again
    ├── PeerFailed              another server that was asked cannot be reached, or failed
    ├── EngineError             the engine failed; the request is lost, the server goes on
    └── InvariantBroken         a conservation law does not hold: a bug, never the caller's fault

HTTP statuses live in one table in `pasture.api.errors`, not here.
"""

from __future__ import annotations


class PastureError(Exception):
    """The root of the tree."""


class ConfigError(PastureError):
    """A setting that cannot be used."""


class ModelError(PastureError):
    """The model file cannot be loaded or used."""


class DoesNotFit(ModelError):
    """The model or its pool is larger than the memory that is free."""


class RequestError(PastureError):
    """The request cannot be served as it stands."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLong(RequestError):
    """The prompt (and its reply) need more cells than one conversation can hold."""


class QueueFull(RequestError):
    """The waiting line is full."""

    def __init__(self, message: str, *, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class RateLimited(QueueFull):
    """A limit of the tenant's own is reached."""


class NotFound(RequestError):
    """There is no such thing, or it belongs to somebody else."""


class Conflict(RequestError):
    """The thing is in use, or is not what the request takes it for."""


class Forbidden(RequestError):
    """The key is valid and does not open this."""


class DeadlineExceeded(RequestError):
    """The request's own time limit passed before it finished."""


class ShuttingDown(RequestError):
    """The server drains: it finishes what runs and takes nothing new."""


class NoReplica(RequestError):
    """There are several machines, and none of them can take the request at present."""


class PeerFailed(PastureError):
    """Another server that was asked cannot be reached, or failed."""


class EngineError(PastureError):
    """The engine failed while it worked on a request."""


class InvariantBroken(PastureError):
    """A conservation law does not hold."""
