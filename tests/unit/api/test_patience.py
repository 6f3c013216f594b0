"""Clients that hold a place and do nothing: half a head, half a body, a stream that nobody reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import httpx
import pytest

from pasture.api import patience, streams
from pasture.api.heads import MAX_HEAD_BYTES
from pasture.api.loiterers import Loiterers
from tests.unit.api.test_disconnect import Exchange
from tests.unit.api.test_server import serving
from tests.unit.api.wire import CHAT, chat_body, error_of
from tests.unit.stub_service import StubService


@dataclass
class Transport:
    aborted: bool = False
    unread: int = 0

    def get_write_buffer_size(self) -> int:
        return self.unread

    def abort(self) -> None:
        self.aborted = True


@dataclass
class Cycle:
    response_complete: bool


@dataclass(eq=False)
class Connection:
    cycle: Cycle | None = None
    timeout_keep_alive_task: object | None = None
    transport: Transport = field(default_factory=Transport)


def test_only_who_owes_a_request_for_too_long_is_dropped() -> None:
    now = [0.0]
    loiterers = Loiterers(lambda: now[0], 30.0)
    silent, half = Connection(), Connection(Cycle(True))
    answered, kept = Connection(Cycle(False)), Connection(Cycle(True), object())
    everybody = {silent, half, answered, kept}
    assert loiterers.sweep(everybody) == 0
    now[0] = 20.0
    half.cycle = Cycle(False)  # its request has come
    assert loiterers.sweep(everybody) == 0
    half.cycle = Cycle(True)
    now[0] = 31.0
    assert loiterers.sweep(everybody) == 1
    assert [one.transport.aborted for one in (silent, half, answered, kept)] == [True, False, False, False]


def test_only_who_takes_nothing_of_an_answer_for_too_long_is_dropped() -> None:
    now = [0.0]
    loiterers = Loiterers(lambda: now[0], stuck_seconds=60.0)
    stuck, slow, quick = (Connection(Cycle(True), object(), Transport(unread=100)) for _ in range(3))
    for now[0] in range(0, 60, 20):
        assert loiterers.sweep({stuck, slow, quick}) == 0
    slow.transport.unread, quick.transport.unread = 99, 0
    for now[0] in (60.0, 61.0):
        loiterers.sweep({stuck, slow, quick})
    assert [one.transport.aborted for one in (stuck, slow, quick)] == [True, False, False]


@pytest.mark.parametrize("begins", [b"GET / HTTP/1.1\r\na: ", b"GET /"])
async def test_a_head_without_end_is_refused(begins: bytes) -> None:
    async with serving(StubService()) as (running, url, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(begins.ljust(MAX_HEAD_BYTES + 1, b"x"))
        answer = await asyncio.wait_for(reader.read(), 30)
        assert answer.startswith(b"HTTP/1.1 431 ")
        assert b"head_too_large" in answer
        writer.close()
        await writer.wait_closed()
        running.stop()


async def test_a_long_head_that_ends_is_answered() -> None:
    async with serving(StubService()) as (running, url, _), httpx.AsyncClient(base_url=url) as client:
        for _ in range(3):
            assert (await client.get("/health", headers={"x-long": "y" * 40_000})).status_code == 200
        running.stop()


async def test_a_body_that_does_not_come_is_not_waited_for(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(patience, "SLOWEST_BYTES_PER_SECOND", 1 << 40)

    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    answer = await client.post(CHAT, content=slow())
    assert answer.status_code == 408
    assert error_of(answer)["code"] == "request_timeout"


async def test_a_client_that_reads_nothing_is_taken_to_be_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "STUCK_SECONDS", 0.02)
    service = StubService()
    exchange = Exchange(service, chat_body(stream=True), reads=False)
    await asyncio.wait_for(exchange.task, 10)
    assert service.open == 0
    assert exchange.sent == []
