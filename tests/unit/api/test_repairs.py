"""A start after a crash: what is known from the state is made ready before anybody asks, from disk or computed."""

from __future__ import annotations

from pathlib import Path
from shutil import rmtree

import pytest

from pasture.api.repairs import RECENT_SECONDS
from pasture.core.values import PUBLIC_NAMESPACE
from pasture.kv.radix import token_array
from pasture.scheduler.scheduler import Scheduler
from pasture.scheduler.service import LocalService
from tests.unit.api.test_pinned import CHAT, HI, LONG, MORE, Server, life


async def talk(server: Server) -> str:
    """A session with a turn in it."""
    session_id = str((await server.client.post("/v1/sessions", json={"messages": [LONG]})).json()["id"])
    body = {"messages": [HI], "session_id": session_id, "max_tokens": 4}
    assert (await server.client.post(CHAT, json=body)).status_code == 200
    return session_id


async def repaired(server: Server) -> int:
    """Let a start do what it does; returns how many tokens were computed for it."""
    await server.gateway.repairs.run()
    service = server.gateway.service
    assert isinstance(service, LocalService)

    def at_work(scheduler: Scheduler) -> bool:
        return scheduler.ahead.waiting

    while await service._ask(at_work):
        pass
    return await service._ask(lambda scheduler: scheduler.ahead.computed_tokens)


async def computed(server: Server, session_id: str) -> int:
    body = {"messages": [MORE], "session_id": session_id, "max_tokens": 2}
    usage = (await server.client.post(CHAT, json=body)).json()["usage"]
    return int(usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"])


@pytest.mark.parametrize("lost", [True, False])
async def test_recent_sessions_are_there_before_they_go_on(tmp_path: Path, lost: bool) -> None:
    async with life(tmp_path) as server:
        session_id = await talk(server)
    if lost:
        rmtree(tmp_path / "kv")
    async with life(tmp_path) as server:
        n_computed = await repaired(server)
        assert (n_computed > len(LONG["content"])) is lost, "what is on disk is not computed again"
        assert await computed(server, session_id) <= len(f"{MORE['content']}\n<|assistant|>")


async def test_sessions_that_were_not_used_lately_are_left_alone(tmp_path: Path) -> None:
    async with life(tmp_path) as server:
        await talk(server)
        assert [s.n_messages for s in server.gateway.state.sessions.recent(RECENT_SECONDS, 9)] == [3]
        assert server.gateway.state.sessions.recent(-1.0, 9) == ()
        assert server.gateway.state.sessions.recent(RECENT_SECONDS, 0) == ()


async def test_what_is_public_is_computed_before_anybody_asks(tmp_path: Path) -> None:
    async with life(tmp_path) as server:
        server.gateway.state.public.add("house", LONG["content"])
        await repaired(server)
        tokens = token_array(server.gateway.prompts.text(f"<|system|>{LONG['content']}"))
        found = await server.gateway.service.locate(PUBLIC_NAMESPACE, tokens)
        assert found.ram_tokens == len(tokens)
