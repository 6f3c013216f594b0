"""Sessions that go to another server: only to those that the operator named, with the key of whoever gets them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import httpx
import pytest

from pasture.api import create_app
from pasture.api.peers import Peer, parse_keys, parse_peers
from pasture.api.server import DrainingServer, ServerOptions, bind
from pasture.core.errors import ConfigError
from pasture.core.values import PoolShape
from pasture.engine.fake import FakeEngine
from pasture.scheduler.service import LocalService
from pasture.scheduler.settings import SchedulerSettings
from pasture.sessions.state import State
from tests.session_support import GREEDY
from tests.store_support import store_for
from tests.unit.api.wire import error_of

SYSTEM = {"role": "system", "content": "Careful and thorough. " * 20}
HI = {"role": "user", "content": "Hi"}


@asynccontextmanager
async def server(*peers: Peer, keys: tuple[str, ...] = (), shape: PoolShape | None = None) -> AsyncIterator[str]:
    """The URL of a server over the fake engine."""
    engine = FakeEngine(shape or PoolShape(4096, 16))
    service = LocalService(engine, store_for(engine), SchedulerSettings())
    state = State(keys=keys)
    started: asyncio.Queue[str] = asyncio.Queue()
    running = DrainingServer(
        create_app(service, replace(GREEDY, peers=peers), state=state), ServerOptions(), started.put_nowait
    )
    task = asyncio.create_task(running.serve([bind("127.0.0.1", 0)]))
    try:
        yield await started.get()
    finally:
        running.stop()
        await task
        service.close()
        state.close()


@asynccontextmanager
async def two(**peer: str | None) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient, str]]:
    """Clients of a server and of its peer `north`, and the peer's URL."""
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(server(keys=("theirs",)))
        ours = await stack.enter_async_context(server(Peer("north", url, peer.get("key"))))
        one = await stack.enter_async_context(httpx.AsyncClient(base_url=ours))
        other = await stack.enter_async_context(
            httpx.AsyncClient(base_url=url, headers={"authorization": "Bearer theirs"}, timeout=30)
        )
        yield one, other, url


async def talked(client: httpx.AsyncClient) -> str:
    session_id = str((await client.post("/v1/sessions", json={"messages": [SYSTEM]})).json()["id"])
    answer = await client.post("/v1/chat/completions", json={"messages": [HI], "session_id": session_id, "max_tokens": 8})
    assert answer.status_code == 200, answer.text
    return session_id


@pytest.mark.parametrize("verb", ["copy", "move"])
@pytest.mark.parametrize("by", ["name", "url"])
async def test_a_session_goes_on_at_a_peer(verb: str, by: str) -> None:
    async with two() as (here, there, url):
        session_id = await talked(here)
        wanted = "north" if by == "name" else url
        answer = await here.post(f"/v1/sessions/{session_id}/{verb}", json={"peer": wanted, "target_key": "theirs"})
        assert answer.status_code == 201, answer.text
        sent = answer.json()
        assert (sent["object"], sent["peer"]) == ("session.sent", "north")
        assert sent["restored_tokens"] > 100
        found = (await there.get(f"/v1/sessions/{sent['id']}?messages=true")).json()
        assert found["messages"][:2] == [SYSTEM, HI]
        body = {"messages": [{"role": "user", "content": "More"}], "session_id": sent["id"], "max_tokens": 4}
        went_on = (await there.post("/v1/chat/completions", json=body)).json()
        assert went_on["usage"]["prompt_tokens_details"]["cached_tokens"] >= sent["restored_tokens"] - 1
        assert (await here.get(f"/v1/sessions/{session_id}")).status_code == (200 if verb == "copy" else 404)


async def test_without_a_key_of_ones_own_the_operators_is_used() -> None:
    async with two(key="theirs") as (here, there, _):
        session_id = await talked(here)
        sent = (await here.post(f"/v1/sessions/{session_id}/copy", json={"peer": "north"})).json()
        assert (await there.get(f"/v1/sessions/{sent['id']}")).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"peer": "south", "target_key": "theirs"}, 404, "no such peer"),
        ({"peer": "http://127.0.0.1:1/", "target_key": "theirs"}, 404, "no such peer"),
        ({"peer": "http://169.254.169.254/latest/meta-data"}, 404, "no such peer"),
        ({"peer": "north"}, 400, "your key there"),
        ({"peer": "north", "target_key": "wrong"}, 409, "API key is not valid"),
        ({}, 400, "whose shall it be"),
    ],
)
async def test_nothing_goes_where_it_should_not(body: dict[str, str], status: int, says: str) -> None:
    async with two() as (here, there, _):
        session_id = await talked(here)
        answer = await here.post(f"/v1/sessions/{session_id}/move", json=body)
        assert answer.status_code == status, answer.text
        assert says in error_of(answer)["message"]
        assert (await here.get(f"/v1/sessions/{session_id}")).status_code == 200, "what did not arrive stays"
        assert (await there.get("/v1/sessions")).json()["data"] == []


async def test_a_peer_that_is_away_or_no_pasture_is_a_502() -> None:
    async def nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 2\r\n\r\nhi")
        await writer.drain()
        writer.close()

    closed = socket.create_server(("127.0.0.1", 0))
    gone = Peer("gone", f"http://127.0.0.1:{closed.getsockname()[1]}", "k")
    closed.close()
    listening = await asyncio.start_server(nonsense, "127.0.0.1", 0)
    odd = Peer("odd", f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", "k")
    async with server(gone, odd) as url, httpx.AsyncClient(base_url=url) as client:
        session_id = str((await client.post("/v1/sessions", json={"messages": [SYSTEM, HI]})).json()["id"])
        for peer in ("gone", "odd"):
            answer = await client.post(f"/v1/sessions/{session_id}/move", json={"peer": peer})
            assert answer.status_code == 502, answer.text
            assert error_of(answer)["code"] == "peer_failed"
        assert (await client.get(f"/v1/sessions/{session_id}")).status_code == 200
    listening.close()
    await listening.wait_closed()


def test_peers_are_read_as_they_are_written() -> None:
    keys = parse_keys("# keys\nnorth = secret=with=signs\n\n")
    assert parse_peers(["north=https://n.example:8443/pasture/", "south=http://s.example"], keys) == (
        Peer("north", "https://n.example:8443/pasture", "secret=with=signs"),
        Peer("south", "http://s.example"),
    )


@pytest.mark.parametrize(
    "text",
    ["north", "north=", "=http://x", "no rth=http://x", "north=file:///etc/passwd", "north=http://u:p@x", "north=http://x/?q"],
)
def test_what_is_no_peer_is_a_clear_error(text: str) -> None:
    with pytest.raises(ConfigError, match="NAME=URL"):
        parse_peers([text], {})


def test_a_key_for_nobody_and_a_line_that_is_none_are_clear_errors() -> None:
    with pytest.raises(ConfigError, match="no peer south"):
        parse_peers(["north=http://x"], {"south": "k"})
    with pytest.raises(ConfigError, match="two named north"):
        parse_peers(["north=http://x", "north=http://y"], {})
    with pytest.raises(ConfigError, match="line 1") as caught:
        parse_keys("secret")
    assert "secret" not in str(caught.value)
