from __future__ import annotations

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pasture.api.middleware import ApiKeys, LastResort, RequestIds
from pasture.sessions.database import Database
from pasture.sessions.tenants import Keyring, Tenants

START: Message = {"type": "http.response.start", "status": 200, "headers": []}


class Wire:
    """Calls an app without a server."""

    def __init__(self) -> None:
        self.sent: list[Message] = []

    async def call(self, app: ASGIApp, kind: str = "http") -> None:
        await app({"type": kind, "path": "/x", "headers": []}, self._receive, self._send)

    async def _receive(self) -> Message:
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self.sent.append(message)


async def breaks(scope: Scope, receive: Receive, send: Send) -> None:
    raise ValueError("a bug")


async def breaks_late(scope: Scope, receive: Receive, send: Send) -> None:
    await send(dict(START))
    raise ValueError("a bug")


async def answers(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "answered"})


async def test_a_bug_before_the_answer_is_a_500() -> None:
    wire = Wire()
    await wire.call(LastResort(breaks))
    assert [message.get("status") for message in wire.sent] == [500, None]


async def test_a_bug_inside_the_answer_is_left_to_the_server() -> None:
    wire = Wire()
    with pytest.raises(ValueError, match="a bug"):
        await wire.call(LastResort(breaks_late))
    assert wire.sent == [START]


async def test_a_bug_outside_http_is_left_to_the_server() -> None:
    with pytest.raises(ValueError, match="a bug"):
        await Wire().call(LastResort(breaks), "lifespan")


KEYRING = Keyring(Tenants(Database()), ["key"])


@pytest.mark.parametrize("app", [RequestIds(answers), LastResort(answers), ApiKeys(answers, KEYRING)])
async def test_what_is_not_http_passes_through(app: ASGIApp) -> None:
    wire = Wire()
    await wire.call(app, "lifespan")
    assert wire.sent == [{"type": "answered"}]
