"""Traces by OpenTelemetry (the `otel` extra): one span a request, and below it one for each of its phases.

    generate ─┬─ queue ── restore ── prefill ── prefill ── decode ── swap ── restore ── decode

Phases come from the engine's thread with the request's usage, as seconds since its submission; spans are made of them when the
request ends, so tracing costs nothing while it runs. A client's `traceparent` header is the parent. Attributes are counts and
ids, never text. On the event loop; the exporter sends from a thread of its own.
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
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from pasture.core.context import REQUEST_ID, TRACE_PARENT
from pasture.core.values import Finish, Phase, PhaseKind, Request, TokenEvent, Usage

_TRACES_PATH = "/v1/traces"
_NANOSECONDS = 1_000_000_000


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
        self._propagator = TraceContextTextMapPropagator()

    async def observed(self, events: AsyncGenerator[TokenEvent, None], request: Request) -> AsyncGenerator[TokenEvent, None]:
        """See `pasture.api.tracing.Tracing.observed`."""
        started, begun = time.time_ns(), time.monotonic()
        span = self._begin(request, started)
        usage: Usage | None = None
        finish: Finish | None = None
        try:
            async with aclosing(events):
                async for event in events:
                    usage, finish = event.usage or usage, event.finish or finish
                    yield event
        except Exception as error:
            span.set_status(StatusCode.ERROR, type(error).__name__)
            raise
        finally:
            if finish is not None:
                usage = finish.usage
            elif usage is not None:
                usage = None if usage is None else _until_now(usage, time.monotonic() - begun)
            self._end(span, started, usage, finish)

    def close(self) -> None:
        self._provider.shutdown()

    def _begin(self, request: Request, started: int) -> Span:
        carrier = {"traceparent": parent} if (parent := TRACE_PARENT.get()) else {}
        attributes: dict[str, str | int] = {"pasture.max_tokens": request.max_tokens}
        if (request_id := REQUEST_ID.get()) is not None:
            attributes["pasture.request_id"] = request_id
        return self._tracer.start_span(
            "generate",
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            start_time=started,
            attributes=attributes,
        )

    def _end(self, span: Span, started: int, usage: Usage | None, finish: Finish | None) -> None:
        if usage is not None:
            span.set_attributes(_counts(usage))
            context = set_span_in_context(span)
            for phase in usage.phases:
                child = self._tracer.start_span(
                    phase.kind.value,
                    context=context,
                    start_time=_moment(started, phase.start_seconds),
                    attributes={"pasture.tokens": phase.n_tokens} if phase.n_tokens else {},
                )
                child.end(_moment(started, phase.end_seconds))
        if finish is not None:
            span.set_attribute("gen_ai.response.finish_reasons", [finish.reason.value])
            if finish.error is not None:
                span.set_status(StatusCode.ERROR, type(finish.error).__name__)
        span.end()


def _until_now(usage: Usage, seconds: float) -> Usage:
    """A reader has ended the request himself, after its first token: it decoded until then."""
    decoded = Phase(PhaseKind.DECODE, usage.first_token_seconds, max(seconds, usage.first_token_seconds), 0)
    return Usage(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens, phases=(*usage.phases, decoded))


def _counts(usage: Usage) -> Mapping[str, int]:
    return {
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "pasture.cached_tokens": usage.cached_tokens,
        "pasture.swaps": usage.n_swaps,
    }


def _moment(started: int, seconds: float) -> int:
    return started + round(seconds * _NANOSECONDS)
