"""Traces over the real scheduler and the engine without a model: one span a request, its phases below it, no text in any."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from pasture.api import ApiSettings, create_app
from pasture.api.otel import OtelTracing, exporting
from pasture.api.tracing import STANDARD_VARIABLES, NoTracing, open_tracing
from pasture.core.errors import ConfigError
from pasture.core.values import PoolShape, Request, RequestId
from pasture.engine.fake import FakeEngine
from pasture.scheduler.service import LocalService
from pasture.scheduler.settings import LayoutChoice, SchedulerSettings
from tests.cluster_support import until
from tests.held_engine import HeldEngine
from tests.store_support import store_for
from tests.unit.stub_service import StubService

SECRET = "the password is sheep"


def exporting_to_memory() -> tuple[InMemorySpanExporter, TracerProvider]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter, provider


@contextmanager
def traced(
    n_cells: int = 4096, engine: FakeEngine | None = None, **options: object
) -> Iterator[tuple[httpx.AsyncClient, InMemorySpanExporter]]:
    exporter, provider = exporting_to_memory()
    engine = engine or FakeEngine(PoolShape(n_cells, 32))
    settings = SchedulerSettings(layout=LayoutChoice.UNIFIED, **options)  # type: ignore[arg-type]
    service = LocalService(engine, store_for(engine), settings)
    tracing = OtelTracing(provider)
    app = create_app(service, ApiSettings(tracing=tracing, turn_ahead=False))
    try:
        yield httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://pasture"), exporter
    finally:
        service.close()
        tracing.close()


async def ask(client: httpx.AsyncClient, text: str, **fields: object) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "ignore_eos": True, **fields}
    return await client.post("/v1/chat/completions", json=body, headers={"x-request-id": "mine"})


def one(spans: tuple[ReadableSpan, ...]) -> tuple[ReadableSpan, list[ReadableSpan]]:
    """The request's span and its children, in the order of their beginnings."""
    (root,) = [span for span in spans if span.name == "generate"]
    children = sorted((span for span in spans if span is not root), key=lambda span: span.start_time or 0)
    assert root.context is not None
    assert all(child.parent is not None and child.parent.span_id == root.context.span_id for child in children)
    return root, children


async def ended(exporter: InMemorySpanExporter) -> tuple[ReadableSpan, list[ReadableSpan]]:
    """The same, of a request whose reader has left: when the engine has said what it had."""
    await until(lambda: any(span.name == "generate" for span in exporter.get_finished_spans()))
    return one(exporter.get_finished_spans())


async def test_a_request_is_one_span_with_its_phases_in_order() -> None:
    with traced() as (client, exporter):
        async with client:
            assert (await ask(client, SECRET)).status_code == 200
        root, children = one(exporter.get_finished_spans())
    assert root.attributes is not None
    assert root.attributes["pasture.request_id"] == "mine"
    assert root.attributes["gen_ai.usage.output_tokens"] == 8
    assert root.attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert [child.name for child in children] == ["queue", "prefill", "decode"]
    assert [(child.attributes or {}).get("pasture.tokens") for child in children] == [
        None,
        root.attributes["gen_ai.usage.input_tokens"],
        7,
    ]
    edges = [edge for child in children for edge in (child.start_time or 0, child.end_time or 0)]
    assert edges == sorted(edges), "one after the other"
    assert (root.start_time or 0) <= edges[0]
    assert edges[-1] <= (root.end_time or 0)
    assert SECRET not in "".join(span.to_json() for span in exporter.get_finished_spans())


async def test_a_long_prompt_is_computed_in_chunks_and_its_rest_is_found() -> None:
    with traced(itl_target_seconds=1e-9) as (client, exporter):
        async with client:
            await asyncio.gather(*(ask(client, f"{name} " * 300, max_tokens=64) for name in ("ada", "bob")))
        chunks = [span for span in exporter.get_finished_spans() if span.name == "prefill"]
        roots = [span for span in exporter.get_finished_spans() if span.name == "generate"]
    assert len(roots) == 2
    assert len(chunks) > 2
    computed = sum(int(str((span.attributes or {})["pasture.tokens"])) for span in chunks)
    prompts = [span.attributes or {} for span in roots]
    assert computed == sum(int(str(p["gen_ai.usage.input_tokens"])) - int(str(p["pasture.cached_tokens"])) for p in prompts)


async def test_whoever_is_swapped_out_has_a_swap_and_a_restore() -> None:
    with traced(n_cells=512) as (client, exporter):
        async with client:
            replies = await asyncio.gather(*(ask(client, f"{i} sheep graze here", max_tokens=200) for i in range(6)))
        assert [reply.status_code for reply in replies] == [200] * 6
        spans = exporter.get_finished_spans()
    (swapped, *_) = [s for s in spans if s.name == "generate" and int(str((s.attributes or {})["pasture.swaps"]))]
    assert swapped.context is not None
    below = sorted(
        (s for s in spans if s.parent and s.parent.span_id == swapped.context.span_id), key=lambda s: s.start_time or 0
    )
    names = [span.name for span in below]
    assert names[0] == "queue"
    assert "restore" in names[names.index("swap") :]
    assert names[-1] == "decode"


async def test_a_reader_who_stops_early_leaves_a_complete_span() -> None:
    with traced() as (client, exporter):
        async with client:
            whole = (await ask(client, "Hello", max_tokens=40)).json()["choices"][0]["message"]["content"]
            exporter.clear()
            await ask(client, "Hello", max_tokens=40, stop=[whole[3:6]], temperature=0, seed=1)
            root, children = await ended(exporter)
    assert root.status.is_ok or root.status.is_unset
    assert children[-1].name == "decode"
    assert int(str((root.attributes or {})["gen_ai.usage.output_tokens"])) > 1, "as many as were computed"


@pytest.mark.parametrize("n_steps", [0, 2])
async def test_a_client_that_leaves_before_the_first_token_leaves_the_phases_that_it_had(n_steps: int) -> None:
    engine = HeldEngine(n_steps)
    with traced(engine=engine, itl_target_seconds=1e-9) as (client, exporter):
        async with client:
            asked = asyncio.create_task(ask(client, "sheep " * 500))
            assert await asyncio.to_thread(engine.held.wait, 10)
            asked.cancel()
            await asyncio.wait([asked])
            assert exporter.get_finished_spans() == (), "it is in a step still"
            engine.go_on.set()
            root, children = await ended(exporter)
    assert [child.name for child in children] == ["queue"] + ["prefill"] * (n_steps + 1)
    assert (root.attributes or {})["gen_ai.usage.output_tokens"] == 0
    assert max(child.end_time or 0 for child in children) <= (root.end_time or 0)


async def test_a_deadline_before_the_first_token_leaves_the_phases_and_an_error() -> None:
    engine = HeldEngine()
    with traced(engine=engine, itl_target_seconds=1e-9) as (client, exporter):
        async with client:
            asked = asyncio.create_task(ask(client, "sheep " * 500, deadline_seconds=0.01))
            assert await asyncio.to_thread(engine.held.wait, 10)
            await asyncio.sleep(0.02)
            engine.go_on.set()
            assert (await asked).status_code == 408
        root, children = one(exporter.get_finished_spans())
    assert root.status.description == "DeadlineExceeded"
    assert [child.name for child in children][:2] == ["queue", "prefill"]


async def test_what_was_never_in_line_has_no_phases() -> None:
    with traced(max_waiting=0) as (client, exporter):
        async with client:
            assert (await ask(client, "Hello")).status_code == 429
        root, children = one(exporter.get_finished_spans())
    assert (root.status.description, children) == ("QueueFull", [])


async def test_a_span_that_waits_for_an_engine_that_is_gone_is_sent_at_the_end() -> None:
    exporter, provider = exporting_to_memory()
    tracing = OtelTracing(provider)
    request = Request(RequestId("r"), (1, 2, 3), 8, traced=True)
    observed = tracing.record(request).observed(StubService().generate(request))
    await anext(observed)
    await observed.aclose()
    assert exporter.get_finished_spans() == ()
    tracing.close()
    assert [span.name for span in exporter.get_finished_spans()] == ["generate"]


async def test_a_clients_trace_goes_on() -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    with traced() as (client, exporter):
        async with client:
            body = {"prompt": "Hello", "max_tokens": 2}
            await client.post("/v1/completions", json=body, headers={"traceparent": f"00-{trace}-b7ad6b7169203331-01"})
        root, _ = one(exporter.get_finished_spans())
    assert root.context is not None
    assert f"{root.context.trace_id:032x}" == trace


def test_without_an_endpoint_nothing_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in STANDARD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert isinstance(open_tracing(None), NoTracing)
    monkeypatch.setenv(STANDARD_VARIABLES[1], "http://127.0.0.1:4318")
    on = open_tracing(None)
    assert on.on
    on.close()


def test_an_endpoint_without_the_extra_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pasture.api.otel", None)
    with pytest.raises(ConfigError, match=r"pasture\[otel\]"):
        open_tracing("http://127.0.0.1:4318")


@contextmanager
def collector() -> Iterator[tuple[str, list[str]]]:
    """The address of something that takes traces, and the paths that they were sent to."""
    paths: list[str] = []

    class Taking(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            paths.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Taking) as server, ThreadPoolExecutor(1) as thread:
        thread.submit(server.serve_forever)
        try:
            yield f"http://127.0.0.1:{server.server_port}", paths
        finally:
            server.shutdown()


@pytest.mark.parametrize("path", ["", "/", "/v1/traces", "/v1/traces/"])
def test_the_collectors_url_needs_no_path(path: str) -> None:
    with collector() as (address, paths):
        tracing = exporting(address + path)
        tracing._tracer.start_span("generate").end()
        tracing.close()
    assert paths == ["/v1/traces"]
