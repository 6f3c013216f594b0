"""Which request the code that runs now belongs to: set once where a request comes in, read where something is logged or traced.

Context variables follow a request through its tasks on the event loop; the engine's thread, which serves everybody at once, has
none. Holds ids that clients chose or got, and nothing that people wrote.
"""

from __future__ import annotations

from contextvars import ContextVar

REQUEST_ID: ContextVar[str | None] = ContextVar("pasture_request_id", default=None)
"""the answer's X-Request-Id"""
TRACE_PARENT: ContextVar[str | None] = ContextVar("pasture_trace_parent", default=None)
"""the request's W3C `traceparent` header"""
