"""Exported files: who holds a place for one and for how long, and what of one is taken in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import pytest
from starlette.types import Message

from pasture.api import create_app, keepers, patience, sending
from pasture.api.keepers import MAX_TRAVELLING_OF_TENANT
from pasture.core.errors import Conflict
from pasture.core.values import Namespace
from pasture.sessions import portable
from tests.unit.api.conftest import Connect
from tests.unit.api.test_peers import server, talked
from tests.unit.api.test_sessions import HI, MORE, SESSIONS, SYSTEM, new_session, said
from tests.unit.api.wire import error_of
from tests.unit.stub_service import StubService

IMPORT = f"{SESSIONS}/import"


class Download:
    """An export whose client takes one message at a time."""

    def __init__(self, transport: httpx.ASGITransport, session_id: str) -> None:
        self.sent: list[Message] = []
        self.begun = asyncio.Event()
        self.takes = asyncio.Semaphore(0)
        path = f"{SESSIONS}/{session_id}/export"
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [],
            "client": ("10.0.0.1", 5000),
            "server": ("pasture", 80),
        }
        self.task = asyncio.ensure_future(transport.app(scope, self._receive, self._send))

    async def _receive(self) -> Message:
        if not self.begun.is_set():
            return {"type": "http.request", "body": b"", "more_body": False}
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async def _send(self, message: Message) -> None:
        self.begun.set()
        await self.takes.acquire()
        self.sent.append(message)


@pytest.fixture
async def transport(service: StubService) -> httpx.ASGITransport:
    return httpx.ASGITransport(create_app(service), raise_app_exceptions=False)


@pytest.fixture
async def client(transport: httpx.ASGITransport) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=transport, base_url="http://pasture") as made:
        yield made


async def test_an_export_has_its_place_until_its_client_has_it(
    client: httpx.AsyncClient, transport: httpx.ASGITransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keepers, "TRAVEL_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(sending, "PIECE_BYTES", 64)
    session_id = await new_session(client, SYSTEM, HI)
    path = f"{SESSIONS}/{session_id}/export"
    whole = (await client.post(path)).content
    slow = [Download(transport, session_id) for _ in range(MAX_TRAVELLING_OF_TENANT)]
    for download in slow:
        await asyncio.wait_for(download.begun.wait(), 10)
        for _ in range(3):
            download.takes.release()
    assert (await client.post(path)).status_code == 429
    for download in slow:
        for _ in range(100):
            download.takes.release()
        await download.task
        assert b"".join(bytes(message.get("body", b"")) for message in download.sent) == whole
        assert max(len(message.get("body", b"")) for message in download.sent) == 64
    assert (await client.post(path)).status_code == 200


async def test_a_client_that_takes_an_export_too_slowly_is_cut_off(
    client: httpx.AsyncClient, transport: httpx.ASGITransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = await new_session(client, SYSTEM, HI)
    with monkeypatch.context() as hasty:
        hasty.setattr(patience, "PATIENCE_SECONDS", 0.02)
        slow = [Download(transport, session_id) for _ in range(MAX_TRAVELLING_OF_TENANT)]
        for download in slow:
            download.takes.release()
            await asyncio.wait_for(download.task, 10)
            assert not any(message.get("more_body") is False for message in download.sent)
    assert (await client.post(f"{SESSIONS}/{session_id}/export")).status_code == 200, "its place is another's"


async def test_an_export_arrives_whole_over_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "PIECE_BYTES", 1000)
    async with server() as url, httpx.AsyncClient(base_url=url) as client:
        session_id = await talked(client)
        answer = await client.post(f"{SESSIONS}/{session_id}/export")
        assert len(answer.content) == int(answer.headers["content-length"]) > 3000
        assert portable.load(answer.content).messages == await said(client, session_id)
        taken = await client.post(IMPORT, content=answer.content)
        assert taken.json()["restored_tokens"] > 100


async def test_an_upload_that_hardly_comes_is_not_waited_for_as_long_as_a_large_one(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0.02)

    async def trickle() -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await asyncio.sleep(0.005)

    answer = await asyncio.wait_for(client.post(IMPORT, content=trickle()), 10)
    assert (answer.status_code, error_of(answer)["code"]) == (408, "request_timeout")


async def test_what_comes_quickly_has_the_time_it_takes(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0.0)
    session_id = await new_session(client, SYSTEM, HI)
    exported = (await client.post(f"{SESSIONS}/{session_id}/export")).content
    monkeypatch.setattr(patience, "TRICKLE_BYTES_PER_SECOND", len(exported) / 10)

    async def quickly() -> AsyncIterator[bytes]:
        yield exported[:-1]
        await asyncio.sleep(0.05)
        yield exported[-1:]

    assert (await client.post(IMPORT, content=quickly())).status_code == 201


class Refusing(StubService):
    """Another model of the same shape: its own KV alone is welcome."""

    async def restore(self, namespace: Namespace, tokens: object, exported: bytes) -> int:
        raise Conflict("the exported KV is of another model")


@pytest.mark.parametrize("why", ["shape", "weights", "template", "refusing template", "edited"])
async def test_adopting_takes_what_was_said_alone_whatever_else_is_of_another_model(connect: Connect, why: str) -> None:
    client = connect(StubService())
    session_id = await new_session(client, SYSTEM, HI)
    exported = (await client.post(f"{SESSIONS}/{session_id}/export")).content
    there = Refusing() if why == "weights" else StubService()
    if why == "shape":
        there.model = replace(there.model, n_layers=3)
    if why == "template":
        there.vocabulary.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    if why == "refusing template":
        there.vocabulary.chat_template = "{{ raise_exception('no') }}"
    if why == "edited":
        exported = portable.dump(replace(portable.load(exported), messages=[SYSTEM, MORE]))
    other = connect(there)
    refused = await other.post(IMPORT, content=exported)
    assert (refused.status_code, error_of(refused)["code"]) == (409, "conflict")
    assert "adopt=true" in error_of(refused)["message"]
    adopted = await other.post(f"{IMPORT}?adopt=true", content=exported)
    assert adopted.status_code == 201, adopted.text
    assert (adopted.json()["n_messages"], adopted.json()["restored_tokens"]) == (2, 0)
    assert not there.restored
