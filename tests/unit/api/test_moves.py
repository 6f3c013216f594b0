"""A session that moves loses nothing, whatever else happens to it while it is being sent."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from pasture.api import ApiSettings, peers
from pasture.api.peers import Peer
from pasture.core.errors import PeerFailed
from pasture.sessions.state import State
from pasture.sessions.values import Counters
from tests.unit.api.test_limits import client_of
from tests.unit.api.test_sessions import HELLO, HI, MORE, SESSIONS, SYSTEM, new_session, said
from tests.unit.api.wire import CHAT, error_of
from tests.unit.stub_service import StubService

NORTH = ApiSettings(peers=(Peer("north", "http://north.example", "k"),))
TO_NORTH = {"peer": "north"}


class Sending:
    """In place of the sending to a peer: takes until it is told to end."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.end = threading.Event()
        self.error: Exception | None = None

    def __call__(self, peer: Peer, key: str | None, file: bytes) -> tuple[str, int]:
        self.begun.set()
        assert self.end.wait(10)
        if self.error is not None:
            raise self.error
        return "sess_there", 7


@pytest.fixture
def sending(monkeypatch: pytest.MonkeyPatch) -> Sending:
    made = Sending()
    monkeypatch.setattr(peers, "send", made)
    return made


@pytest.fixture
async def state() -> AsyncIterator[State]:
    made = State()
    yield made
    made.close()


@asynccontextmanager
async def moving(client: httpx.AsyncClient, session_id: str, sending: Sending) -> AsyncIterator[asyncio.Task[httpx.Response]]:
    """A move that is under way within the block, and ends with it."""
    task = asyncio.create_task(client.post(f"{SESSIONS}/{session_id}/move", json=TO_NORTH))
    try:
        assert await asyncio.to_thread(sending.begun.wait, 10)
        yield task
    finally:
        sending.end.set()
        await task


async def test_nobody_goes_on_from_a_session_while_it_moves(state: State, sending: Sending) -> None:
    service = StubService()
    async with client_of(service, state, NORTH) as client:
        session_id = await new_session(client, SYSTEM)
        async with moving(client, session_id, sending) as move:
            for path, body in (
                (CHAT, {"messages": [HI], "session_id": session_id}),
                (CHAT, {"messages": [HI], "session_id": session_id, "stream": True}),
                (f"{SESSIONS}/{session_id}/move", TO_NORTH),
            ):
                refused = await client.post(path, json=body)
                assert (refused.status_code, error_of(refused)["code"]) == (409, "conflict")
            assert not service.requests
        assert (move.result().status_code, move.result().json()["id"]) == (201, "sess_there")
        assert (await client.get(f"{SESSIONS}/{session_id}")).status_code == 404


async def test_a_session_does_not_move_while_a_request_goes_on_from_it(state: State, sending: Sending) -> None:
    service = StubService(hold=asyncio.Event())
    assert service.hold is not None
    async with client_of(service, state, NORTH) as client:
        session_id = await new_session(client, SYSTEM)
        chat = asyncio.create_task(client.post(CHAT, json={"messages": [HI], "session_id": session_id}))
        await asyncio.wait_for(service.begun.wait(), 10)
        assert (await client.post(f"{SESSIONS}/{session_id}/move", json=TO_NORTH)).status_code == 409
        assert not sending.begun.is_set()
        service.hold.set()
        assert (await chat).status_code == 200
        assert await said(client, session_id) == [SYSTEM, HI, HELLO]


async def test_a_session_that_is_another_one_at_the_end_stays_and_the_copy_is_named(state: State, sending: Sending) -> None:
    async with client_of(StubService(), state, NORTH) as client:
        session_id = await new_session(client, SYSTEM, HI)
        async with moving(client, session_id, sending) as move:  # what another server with this state does shows here alone
            state.sessions.advance(state.open_tenant, session_id, [SYSTEM, HI, HELLO], n_tokens=9, used=Counters(1))
        assert move.result().status_code == 409
        assert "sess_there is what it was before" in error_of(move.result())["message"]
        assert await said(client, session_id) == [SYSTEM, HI, HELLO]
        assert (await client.post(CHAT, json={"messages": [MORE], "session_id": session_id})).status_code == 200


async def test_a_session_that_is_deleted_while_it_moves_has_moved(state: State, sending: Sending) -> None:
    async with client_of(StubService(), state, NORTH) as client:
        session_id = await new_session(client, SYSTEM)
        async with moving(client, session_id, sending) as move:
            assert (await client.delete(f"{SESSIONS}/{session_id}")).status_code == 200
        assert (move.result().status_code, move.result().json()["id"]) == (201, "sess_there")


async def test_a_move_that_failed_leaves_the_session_to_others(state: State, sending: Sending) -> None:
    sending.error = PeerFailed("away")
    async with client_of(StubService(), state, NORTH) as client:
        session_id = await new_session(client, SYSTEM)
        async with moving(client, session_id, sending) as move:
            pass
        assert move.result().status_code == 502
        assert (await client.post(CHAT, json={"messages": [HI], "session_id": session_id})).status_code == 200
        assert await said(client, session_id) == [SYSTEM, HI, HELLO]


async def test_whether_somebody_elses_session_is_in_use_is_nobodys_business(state: State, sending: Sending) -> None:
    one, two = ({"authorization": f"Bearer {state.tenants.add_key(name)[0]}"} for name in ("one", "two"))
    async with client_of(StubService(), state, NORTH) as client:
        client.headers.update(one)
        session_id = await new_session(client, SYSTEM)
        async with moving(client, session_id, sending):
            answer = await client.post(f"{SESSIONS}/{session_id}/move", json=TO_NORTH, headers=two)
            assert answer.status_code == 404
