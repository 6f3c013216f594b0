"""Traces: what a request spent its time with, for OpenTelemetry. Off unless a server is told where to send them.

Owns the port and its null object; `pasture.api.otel` is the implementation, so that nothing here needs the `otel` extra. On the
event loop.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from typing import Protocol

from pasture.core.errors import ConfigError
from pasture.core.ports import OnEnd
from pasture.core.values import Request, TokenEvent


class Record(Protocol):
    """What is noted of one request."""

    @property
    def on_end(self) -> OnEnd | None:
        """For `Service.generate`: the span of a request that its reader leaves waits for it."""
        ...

    def observed(self, events: AsyncGenerator[TokenEvent, None]) -> AsyncGenerator[TokenEvent, None]:
        """The same events, and a span when the request has ended, however it does. Takes over `events` and closes it."""
        ...


class Tracing(Protocol):
    @property
    def on(self) -> bool:
        """Whether requests should note their phases."""
        ...

    def record(self, request: Request) -> Record: ...

    def close(self) -> None:
        """Send what is left."""
        ...


class NoRecord:
    on_end = None

    def observed(self, events: AsyncGenerator[TokenEvent, None]) -> AsyncGenerator[TokenEvent, None]:
        return events


class NoTracing:
    on = False

    def record(self, request: Request) -> NoRecord:
        return NoRecord()

    def close(self) -> None:
        pass


STANDARD_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""OpenTelemetry's own, which say where traces go as well as a setting of ours"""


def open_tracing(endpoint: str | None) -> Tracing:
    """Traces to a collector's URL, or to where the standard variables say; none without both.

    Raises ConfigError when they are wanted and the `otel` extra is not installed.
    """
    if endpoint is None and not any(map(os.environ.get, STANDARD_VARIABLES)):
        return NoTracing()
    try:
        from pasture.api.otel import exporting
    except ImportError as error:
        raise ConfigError(f"otel_endpoint: traces need an extra (pip install 'pasture[otel]'): {error}") from error
    return exporting(endpoint)
