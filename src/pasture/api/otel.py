"""Traces by OpenTelemetry (the `otel` extra): one span a request, and below it one for each of its phases.

    generate ─┬─ queue ── restore ── prefill ── prefill ── decode ── swap ── restore ── decode

Phases come from the engine's thread with the request's usage, as seconds since its submission; spans are made of them when the
request ends, so tracing costs nothing while it runs; the span of a request that its reader leaves, or that fails, is made when
the engine has said what it had until then. A client's `traceparent` header is the parent. Attributes are counts and ids, never
text. On the event loop; the exporter sends from a thread of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from importlib.metadata import version

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from pasture.core.context import REQUEST_ID, TRACE_PARENT
from pasture.core.values import Finish, Request, TokenEvent, Usage

_TRACES_PATH = "/v1/traces"
_NANOSECONDS = 1_000_000_000
_PROPAGATOR = TraceContextTextMapPropagator()


def exporting(endpoint: str | None) -> OtelTracing:
    """Traces sent over OTLP/HTTP to a collector's URL, or to where the standard environment variables say."""
    if endpoint is not None:
        endpoint = endpoint.rstrip("/").removesuffix(_TRACES_PATH) + _TRACES_PATH
    name = os.environ.get("OTEL_SERVICE_NAME", "pasture")
    provider = TracerProvider(resource=Resource.create({"service.name": name, "service.version": version("pasture")}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return OtelTracing(provider)


class OtelTracing:
    on = True

    def __init__(self, provider: TracerProvider) -> None:
        """The provider is this object's from here on."""
        self._provider = provider
        self._tracer = provider.get_tracer("pasture", version("pasture"))
        self._unended: set[_Record] = set()
        """whose readers have left, and the engine has not said yet what they had"""

    def record(self, request: Request) -> _Record:
        return _Record(self._tracer, self._unended, request)

    def close(self) -> None:
        for record in tuple(self._unended):
            record.end()
        self._provider.shutdown()


class _Record:
    """One request's span. Where its reader has left, it waits for the engine to say what the request had until then."""

    def __init__(self, tracer: Tracer, unended: set[_Record], request: Request) -> None:
        """Is in `unended` while it waits for the engine."""
        self._tracer = tracer
        self._unended = unended
        self._request = request
        self._span: Span = INVALID_SPAN
        self._started = self._left = 0
        """Unix time in ns, of the reader"""
        self._usage: Usage | None = None
        self._told = False

    def on_end(self, usage: Usage) -> None:
        self._usage, self._told = usage, True
        if self in self._unended:
            self.end()

    async def observed(self, events: AsyncGenerator[TokenEvent, None]) -> AsyncGenerator[TokenEvent, None]:
        """See `pasture.api.tracing.Record.observed`."""
        self._begin()
        left_early = True
        try:
            async with aclosing(events):
                async for event in events:
                    self._usage = event.usage or self._usage
                    if event.finish is not None:
                        left_early = False
                        self._finished(event.finish)
                    yield event
            left_early = False
        except Exception as error:
            left_early = False
            self._span.set_status(StatusCode.ERROR, type(error).__name__)
            raise
        finally:
            self._left = time.time_ns()
            if left_early and not self._told:
                self._unended.add(self)
            else:
                self.end()

    def end(self) -> None:
        """With what is known."""
        self._unended.discard(self)
        ended = self._left
        if self._usage is not None:
            self._span.set_attributes(_counts(self._usage))
            context = set_span_in_context(self._span)
            for phase in self._usage.phases:
                child = self._tracer.start_span(
                    phase.kind.value,
                    context=context,
                    start_time=self._moment(phase.start_seconds),
                    attributes={"pasture.tokens": phase.n_tokens} if phase.n_tokens else {},
                )
                child.end(self._moment(phase.end_seconds))
                ended = max(ended, self._moment(phase.end_seconds))  # the step that a reader leaves in goes on
        self._span.end(ended)

    def _begin(self) -> None:
        self._started = time.time_ns()
        carrier = {"traceparent": parent} if (parent := TRACE_PARENT.get()) else {}
        attributes: dict[str, str | int] = {"pasture.max_tokens": self._request.max_tokens}
        if (request_id := REQUEST_ID.get()) is not None:
            attributes["pasture.request_id"] = request_id
        self._span = self._tracer.start_span(
            "generate",
            context=_PROPAGATOR.extract(carrier),
            kind=SpanKind.SERVER,
            start_time=self._started,
            attributes=attributes,
        )

    def _finished(self, finish: Finish) -> None:
        self._usage = finish.usage
        self._span.set_attribute("gen_ai.response.finish_reasons", [finish.reason.value])
        if finish.error is not None:
            self._span.set_status(StatusCode.ERROR, type(finish.error).__name__)

    def _moment(self, seconds: float) -> int:
        return self._started + round(seconds * _NANOSECONDS)


def _counts(usage: Usage) -> Mapping[str, int]:
    return {
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "pasture.cached_tokens": usage.cached_tokens,
        "pasture.swaps": usage.n_swaps,
    }
