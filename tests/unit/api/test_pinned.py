"""Pinned sessions: what is in RAM for them, before a restart and after one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from pasture.api import create_app
from pasture.api.gateway import Gateway
from pasture.core.values import PoolShape
from pasture.engine.fake import FakeEngine
from pasture.scheduler.service import LocalService
from pasture.scheduler.settings import SchedulerSettings
from pasture.sessions.state import State
from pasture.tiers.disk import DiskTier
from tests.session_support import GREEDY
from tests.store_support import store_for
from tests.unit.stub_service import StubService

LONG = {"role": "system", "content": "Careful and thorough. " * 20}
HI = {"role": "user", "content": "Hi"}
MORE = {"role": "user", "content": "More, please"}
CHAT = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Server:
    """One life of a server whose disk and state outlive it."""

    client: httpx.AsyncClient
    gateway: Gateway

    @property
    def pinned_bytes(self) -> int:
        return self.gateway.service.statistics().store.tiers[0].pinned_bytes

    async def made(self) -> str:
        """A session with a turn in it, pinned."""
        session_id = str((await self.client.post("/v1/sessions", json={"messages": [LONG]})).json()["id"])
        assert (await self.client.post(CHAT, json={"messages": [HI], "session_id": session_id})).status_code == 200
        assert (await self.client.post(f"/v1/sessions/{session_id}/pin")).status_code == 200
        return session_id


@asynccontextmanager
async def life(folder: Path, ram_bytes: int = 1 << 30) -> AsyncIterator[Server]:
    engine = FakeEngine(PoolShape(4096, 16))
    service = LocalService(engine, store_for(engine, ram_bytes, [DiskTier(folder / "kv", 1 << 30)]), SchedulerSettings())
    state = State(str(folder / "state.db"))
    app = create_app(service, GREEDY, state=state)
    gateway: Gateway = app.state.gateway
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://pasture") as client:
            yield Server(client, gateway)
    finally:
        await gateway.pinned.close()
        service.close()
        state.close()


async def test_a_pin_survives_a_restart(tmp_path: Path) -> None:
    async with life(tmp_path) as server:
        session_id = await server.made()
        before = server.pinned_bytes
        assert before > 0
    async with life(tmp_path) as server:
        assert server.pinned_bytes == 0
        found = (await server.client.get(f"/v1/sessions/{session_id}")).json()["cache"]
        assert found["tiers"] == {"live": 0, "ram": 0, "disk": found["tokens"]}
        await server.gateway.pinned.bring_back()
        assert server.pinned_bytes == before
        found = (await server.client.get(f"/v1/sessions/{session_id}")).json()
        assert found["cache"]["tiers"]["ram"] == found["cache"]["tokens"]
        assert len(server.gateway.pinned) == 1
        await server.client.post(f"/v1/sessions/{session_id}/unpin")
        assert len(server.gateway.pinned) == 0


async def test_what_was_deleted_or_unpinned_is_not_brought_back(tmp_path: Path) -> None:
    async with life(tmp_path) as server:
        for end in ("unpin", "delete"):
            session_id = await server.made()
            path = f"/v1/sessions/{session_id}"
            await (server.client.delete(path) if end == "delete" else server.client.post(f"{path}/unpin"))
    async with life(tmp_path) as server:
        await server.gateway.pinned.bring_back()
        assert len(server.gateway.pinned) == 0
        assert server.pinned_bytes == 0


async def test_no_more_is_brought_back_than_ram_has_room_for(tmp_path: Path) -> None:
    async with life(tmp_path) as server:
        session_id = await server.made()
        before = server.pinned_bytes
    async with life(tmp_path, ram_bytes=before) as server:
        await server.gateway.pinned.bring_back()
        assert len(server.gateway.pinned) == 0
        found = (await server.client.get(f"/v1/sessions/{session_id}")).json()
        assert found["pinned"], "it does not expire all the same"


async def test_a_pin_follows_its_conversation(tmp_path: Path) -> None:
    async with life(tmp_path) as server:
        session_id = await server.made()
        before = server.pinned_bytes
        answer = await server.client.post(CHAT, json={"messages": [MORE], "session_id": session_id, "max_tokens": 200})
        assert answer.status_code == 200
        await server.gateway.pinned.settled()
        assert server.pinned_bytes > before


async def test_what_is_cut_off_a_pinned_conversation_is_not_kept_for_it() -> None:
    service, state = StubService(), State()
    app = create_app(service, state=state)
    gateway: Gateway = app.state.gateway
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://pasture") as client:
        session_id = str((await client.post("/v1/sessions", json={"messages": [LONG, HI]})).json()["id"])
        assert (await client.post(f"/v1/sessions/{session_id}/pin")).status_code == 200
        for n_messages in (1, 0):
            await client.post(f"/v1/sessions/{session_id}/truncate", json={"messages": n_messages})
            await gateway.pinned.settled()
        assert len(gateway.pinned) == 0
        assert (await client.post(CHAT, json={"messages": [MORE], "session_id": session_id})).status_code == 200
        await gateway.pinned.settled()
    whole, cut, later = service.pins
    assert whole.of[1][: len(cut.of[1]) - 1] == cut.of[1][:-1]
    assert len(cut.of[1]) < len(whole.of[1])
    assert whole.released
    assert cut.released, "where nothing is left, nothing is kept"
    assert not later.released, "and what is said then is"
    state.close()
