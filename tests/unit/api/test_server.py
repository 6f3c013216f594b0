"""The server on a real socket: its port, its end in two stages, and what keeps it from starting."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from pasture.api import create_app, run, server
from pasture.api.server import DrainingServer, ServerOptions, bind
from pasture.core.errors import ConfigError
from pasture.core.ports import Service
from pasture.core.values import PoolShape, StepPlan, StepResult
from pasture.engine.fake import FakeEngine
from pasture.scheduler.service import LocalService
from pasture.scheduler.settings import SchedulerSettings
from tests.store_support import store_for
from tests.unit.api.wire import CHAT, chat_body
from tests.unit.stub_service import StubService


class SlowDrain(StubService):
    """Drains as a real service does: until its open replies have ended."""

    async def drain(self) -> bool:
        await super().drain()
        while self.open:  # noqa: ASYNC110 (a stub)
            await asyncio.sleep(0)
        return True


@asynccontextmanager
async def serving(service: Service) -> AsyncIterator[tuple[DrainingServer, str, asyncio.Task[None]]]:
    """A running server, its URL and its task; the task must end inside the block."""
    started: asyncio.Queue[str] = asyncio.Queue()
    running = DrainingServer(create_app(service), ServerOptions(), started.put_nowait)
    task = asyncio.create_task(running.serve([bind("127.0.0.1", 0)]))
    yield running, await started.get(), task
    await task


async def test_the_port_that_was_found_is_reported() -> None:
    async with serving(StubService()) as (running, url, _), httpx.AsyncClient(base_url=url) as client:
        assert int(url.rpartition(":")[2]) > 0
        assert (await client.post(CHAT, json=chat_body())).status_code == 200
        running.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_first_signal_lets_open_streams_finish(number: signal.Signals) -> None:
    service = SlowDrain(hold=asyncio.Event())
    async with (
        serving(service) as (_, url, task),
        httpx.AsyncClient(base_url=url) as client,
        client.stream("POST", CHAT, json=chat_body(stream=True)) as response,
    ):
        lines = response.aiter_lines()
        assert "assistant" in await anext(lines)
        os.kill(os.getpid(), number)
        while service.ready:  # noqa: ASYNC110 (the signal arrives when it does)
            await asyncio.sleep(0)
        assert (await client.get("/health")).status_code == 503
        assert (await client.get("/health/live")).status_code == 200
        assert not task.done()
        assert service.hold is not None
        service.hold.set()
        assert [line async for line in lines if line][-1] == "data: [DONE]"
    assert not service.closed


async def test_the_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_LAST_WORDS_SECONDS", 0.05)
    service = SlowDrain(hold=asyncio.Event())
    async with serving(service) as (_, url, task), httpx.AsyncClient(base_url=url) as client:
        async with client.stream("POST", CHAT, json=chat_body(stream=True)) as response:
            lines = response.aiter_lines()
            await anext(lines)
            os.kill(os.getpid(), signal.SIGTERM)
            while service.ready:  # noqa: ASYNC110 (the signal arrives when it does)
                await asyncio.sleep(0)
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(httpx.HTTPError):
                [line async for line in lines]
        await task
    assert service.closed
    assert service.open == 0


def test_a_taken_port_is_one_clear_error() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1 port"),
    ):
        run(create_app(StubService()), port=taken.getsockname()[1])


@pytest.mark.parametrize(("host", "port"), [("203.0.113.1", 0), ("127.0.0.1", 99999)])
def test_an_impossible_address_is_one_clear_error(host: str, port: int) -> None:
    with pytest.raises(ConfigError, match="cannot listen"):
        bind(host, port)


def test_a_certificate_that_cannot_be_used_is_one_clear_error(tmp_path: Path) -> None:
    nonsense = tmp_path / "cert.pem"
    nonsense.write_text("not a certificate")
    for file in (nonsense, tmp_path / "missing.pem"):
        with pytest.raises(ConfigError, match="TLS certificate"):
            run(create_app(StubService()), port=0, ssl_cert_file=str(file), ssl_key_file=str(file))


class Deliberate(FakeEngine):
    """Takes its time for each step."""

    def execute(self, plan: StepPlan) -> StepResult:
        if plan.works:
            self.interrupted.wait(0.02)
        return super().execute(plan)


async def test_replies_that_take_longer_than_a_drain_may_are_ended() -> None:
    engine = Deliberate(PoolShape(8192, 4))
    service = LocalService(engine, store_for(engine), SchedulerSettings(drain_seconds=0.2))
    async with (
        serving(service) as (running, url, task),
        httpx.AsyncClient(base_url=url) as client,
        client.stream("POST", CHAT, json=chat_body(stream=True, max_tokens=4000, ignore_eos=True)) as response,
    ):
        lines = response.aiter_lines()
        assert "assistant" in await anext(lines)
        running.stop()
        async with asyncio.timeout(5):
            rest = [line async for line in lines]
            await task
    assert len(rest) < 1000
    assert not service.alive


async def test_the_second_signal_waits_for_no_step_and_keeps_the_loop_free() -> None:
    class Stuck(FakeEngine):
        begun = threading.Event()

        def execute(self, plan: StepPlan) -> StepResult:
            if plan.works:
                self.begun.set()
                self.interrupted.wait(30.0)
            return super().execute(plan)

    engine = Stuck(PoolShape(8192, 4))
    service = LocalService(engine, store_for(engine))
    async with serving(service) as (running, url, task), httpx.AsyncClient(base_url=url) as client:
        asked = asyncio.create_task(client.post(CHAT, json=chat_body()))
        assert await asyncio.to_thread(engine.begun.wait, 5.0)
        running.stop()
        await asyncio.sleep(0.05)
        running.stop()
        async with asyncio.timeout(5):
            with contextlib.suppress(httpx.HTTPError):
                await asked
            await task
    assert not service.alive
