"""Clients that leave, and clients that wait: driven through ASGI itself, where every message is under the test's control."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable

import pytest
from starlette.types import Message

from pasture.api import create_app, streams
from pasture.core.values import Finish, FinishReason, Request, TokenEvent, Usage
from tests.unit.api.wire import CHAT, chat_body
from tests.unit.stub_service import StubService


class Exchange:
    """One request to an app, whose client can leave at any moment."""

    def __init__(self, service: StubService, body: dict[str, object], *, reads: bool = True) -> None:
        self.sent: list[Message] = []
        self._reading = asyncio.Event()
        if reads:
            self._reading.set()
        self._incoming: asyncio.Queue[Message] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
        self._news = asyncio.Event()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": CHAT,
            "raw_path": CHAT.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "client": ("10.0.0.1", 5000),
            "server": ("pasture", 80),
        }
        self.task = asyncio.create_task(create_app(service)(scope, self._incoming.get, self._send))

    def leave(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._news.clear()
            await self._news.wait()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    async def _send(self, message: Message) -> None:
        await self._reading.wait()
        self.sent.append(message)
        self._news.set()


async def settled(condition: Callable[[], bool]) -> None:
    """Let the loop run until the condition holds."""
    while not condition():  # noqa: ASYNC110 (inside the app: nothing to wait for)
        await asyncio.sleep(0)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_frees_its_requests_at_once(stream: bool, n: int, caplog: pytest.LogCaptureFixture) -> None:
    service = StubService(hold=asyncio.Event())
    exchange = Exchange(service, chat_body(stream=stream, n=n))
    await settled(lambda: service.open == n)
    exchange.leave()
    await exchange.task
    assert service.open == 0
    assert b"[DONE]" not in exchange.body
    assert not caplog.records, "leaving is nobody's error"


async def test_a_client_that_leaves_in_the_middle_of_a_stream_frees_its_request() -> None:
    service = StubService(hold=asyncio.Event())
    exchange = Exchange(service, chat_body(stream=True))
    await exchange.until(lambda: b'"content":"H"' in exchange.body)
    exchange.leave()
    await exchange.task
    assert service.open == 0


async def test_a_cancelled_server_task_frees_its_request() -> None:
    service = StubService(hold=asyncio.Event())
    exchange = Exchange(service, chat_body(stream=True))
    await settled(lambda: service.open == 1)
    exchange.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await exchange.task
    assert service.open == 0


async def test_one_failing_choice_ends_the_others() -> None:
    async def script(request: Request) -> AsyncGenerator[TokenEvent, None]:
        yield TokenEvent(97)
        if request.request_id.endswith("-1"):
            raise ValueError("this choice broke")
        await asyncio.Event().wait()

    service = StubService(script=script)
    exchange = Exchange(service, chat_body(stream=True, n=3))
    await exchange.task
    assert service.open == 0
    assert b'"error"' in exchange.body


async def test_a_long_wait_opens_the_stream_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "OPENING_SECONDS", 0)
    monkeypatch.setattr(streams, "COMMENT_SECONDS", 0)
    gate = asyncio.Event()

    async def script(request: Request) -> AsyncGenerator[TokenEvent, None]:
        await gate.wait()
        yield TokenEvent(97, finish=Finish(FinishReason.STOP, Usage(1, 0, 1)))

    exchange = Exchange(StubService(script=script), chat_body(stream=True))
    await exchange.until(lambda: exchange.body.count(b": waiting\n\n") >= 2)
    assert exchange.sent[0]["status"] == 200
    gate.set()
    await exchange.task
    assert [message["type"] for message in exchange.sent].count("http.response.start") == 1
    assert exchange.body.endswith(b"data: [DONE]\n\n")


async def test_a_slow_reader_holds_its_choices_back() -> None:
    """With a reader that takes nothing, no choice runs ahead by more than the queue between them holds."""
    taken = 0

    async def script(request: Request) -> AsyncGenerator[TokenEvent, None]:
        nonlocal taken
        for _ in range(1000):
            taken += 1
            yield TokenEvent(97)

    exchange = Exchange(StubService(script=script), chat_body(stream=True, n=2), reads=False)
    await settled(lambda: taken > 0)
    for _ in range(200):
        await asyncio.sleep(0)
    assert taken < 20
    exchange.leave()
    await exchange.task
