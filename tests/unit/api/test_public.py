"""Public prefixes: their own KV serves everybody, and nothing that follows them does."""

from __future__ import annotations

import time
from typing import Any

import httpx

from pasture.api.publics import Publics
from pasture.core.errors import QueueFull
from pasture.sessions.state import State
from pasture.text.prompts import Prompts
from tests.session_support import World, answer_to, world
from tests.unit.stub_service import StubService

SYSTEM = {"role": "system", "content": "You know the house rules. " * 12}
QUESTION = {"role": "user", "content": "And what is my secret? " * 6}
ADMIN = {"authorization": "Bearer admin"}


async def ask(client: httpx.AsyncClient, *messages: dict[str, str]) -> Any:
    answer = await client.post("/chat/completions", json={"messages": messages, "max_tokens": 4})
    assert answer.json()["choices"][0]["message"]["content"] == answer_to(messages, 4)
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


async def taken_up(at: World) -> None:
    """The first request after a change has it read; here it is waited for."""
    app: Any = at.transport.app
    await app.state.gateway.publics.refresh()


async def test_a_declared_beginning_is_there_for_tenants_who_never_sent_it() -> None:
    async with world(["one", "two"]) as at, at.http("one") as one, at.http("two") as two:
        declared = {"name": "house", "content": SYSTEM["content"]}
        assert (await one.post("/admin/public", json=declared, headers=ADMIN)).status_code == 201
        await taken_up(at)
        n_public = len(f"<|system|>{SYSTEM['content']}\n")
        assert await ask(one, SYSTEM, QUESTION) == n_public
        assert await ask(two, SYSTEM, QUESTION) == n_public, "what follows is another tenant's"
        assert await ask(two, SYSTEM, QUESTION) > n_public
        (found,) = (await one.get("/admin/public", headers=ADMIN)).json()["data"]
        assert found == {"name": "house", "bytes": len(SYSTEM["content"])}


async def test_what_is_withdrawn_serves_nobody_new() -> None:
    async with world(["one", "two"]) as at, at.http("one") as one, at.http("two") as two:
        at.state.public.add("raw", f"<|system|>{SYSTEM['content']}\n", role=None)
        await taken_up(at)
        assert await ask(one, SYSTEM, QUESTION) > 300
        await one.delete("/admin/public/raw", headers=ADMIN)
        await taken_up(at)
        assert await ask(two, SYSTEM, QUESTION) == 0


async def test_what_is_not_declared_is_not_public_because_it_begins_like_it() -> None:
    async with world(["one", "two"]) as at, at.http("one") as one, at.http("two") as two:
        at.state.public.add("house", SYSTEM["content"])
        await taken_up(at)
        longer = {"role": "system", "content": SYSTEM["content"] + "And the code is 1234. " * 10}
        await ask(one, longer, QUESTION)
        n_public = len(f"<|system|>{SYSTEM['content']}")
        assert await ask(two, longer, QUESTION) == n_public


async def test_what_could_not_be_computed_is_tried_again() -> None:
    service, state = StubService(error=QueueFull("the line is full", retry_after_seconds=1)), State()
    state.public.add("house", "You know the house rules.")
    publics = Publics(service, state.public, Prompts(service.vocabulary), clock=time.monotonic)
    await publics.refresh()
    assert not service.pins
    service.error = None
    await publics.refresh()
    assert len(service.pins) == 1
    await publics.refresh()
    assert len(service.pins) == 1
    state.close()
