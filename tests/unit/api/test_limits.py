"""Keys, tenants and their limits over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from pasture.api import ApiSettings, create_app
from pasture.core.errors import QueueFull
from pasture.core.values import DEFAULT_NAMESPACE, Request, TokenEvent
from pasture.sessions.state import State
from pasture.sessions.values import Share
from tests.session_support import world
from tests.unit.api.conftest import Connect
from tests.unit.api.wire import CHAT, chat_body, error_of
from tests.unit.stub_service import StubService


def client_of(service: StubService, state: State, settings: ApiSettings | None = None) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(create_app(service, settings, state=state), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://pasture")


async def test_each_key_is_its_tenants_and_an_open_server_is_one(connect: Connect) -> None:
    service = StubService()
    keyed = connect(service, ApiSettings(api_keys=("one", "two")))
    for key in ("one", "two", "one"):
        await keyed.post(CHAT, json=chat_body(), headers={"authorization": f"Bearer {key}"})
    await connect(service).post(CHAT, json=chat_body())
    one, two, again, opened = service.requests
    assert (one.namespace, one.tenant) == (again.namespace, again.tenant)
    assert len({one.namespace, two.namespace, opened.namespace}) == 3
    assert (opened.namespace, opened.tenant) == (DEFAULT_NAMESPACE, "default")


async def test_weight_and_priority_reach_the_line() -> None:
    service, state = StubService(), State()
    secret, _ = state.tenants.add_key("heavy")
    state.tenants.limit("heavy", weight=3.0, max_priority=1)
    async with client_of(service, state) as client:
        client.headers["authorization"] = f"Bearer {secret}"
        await client.post(CHAT, json=chat_body(service_tier="priority"))
        await client.post(CHAT, json=chat_body(), headers={"x-priority": "low"})
        await client.post(CHAT, json=chat_body())
        assert (await client.post(CHAT, json=chat_body(), headers={"x-priority": "most"})).status_code == 400
    assert [request.priority for request in service.requests] == [1, -1, 0]
    assert {request.allowance.weight for request in service.requests} == {3.0}
    state.close()


async def test_no_tenant_has_more_priority_than_it_is_allowed_and_an_open_server_allows_all() -> None:
    service, state = StubService(), State()
    secret, _ = state.tenants.add_key("usual")
    async with client_of(service, state) as client:
        headers = {"authorization": f"Bearer {secret}"}
        await client.post(CHAT, json=chat_body(service_tier="priority"), headers=headers)
        await client.post(CHAT, json=chat_body(), headers=headers | {"x-priority": "high"})
        await client.post(CHAT, json=chat_body(service_tier="flex"), headers=headers)
    state.close()
    opened = State()
    async with client_of(service, opened) as client:
        await client.post(CHAT, json=chat_body(service_tier="priority"))
    opened.close()
    assert [request.priority for request in service.requests] == [0, 0, -1, 1]


async def test_a_tenants_cells_are_the_longest_conversation_it_can_have() -> None:
    service, state = StubService(), State()
    secret, _ = state.tenants.add_key("small")
    state.tenants.limit("small", max_live_cells=200, max_ram_bytes=1000, guaranteed_share=0.25)
    async with client_of(service, state) as client:
        client.headers["authorization"] = f"Bearer {secret}"
        await client.post(CHAT, json=chat_body(max_tokens=None))
        answer = await client.post(CHAT, json=chat_body(messages=[{"role": "user", "content": "x" * 300}]))
    state.close()
    (request,) = service.requests
    assert len(request.prompt) + request.max_tokens == 200
    assert (request.allowance.live_cells, request.allowance.ram_bytes, request.allowance.guaranteed_share) == (200, 1000, 0.25)
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "context_length_exceeded"


async def test_where_everybody_shares_one_cache_nobodys_limits_apply_to_it() -> None:
    service, state = StubService(), State(share=Share.ALL)
    secret, _ = state.tenants.add_key("small")
    state.tenants.limit("small", max_live_cells=200, weight=2.0)
    async with client_of(service, state) as client:
        await client.post(CHAT, json=chat_body(), headers={"authorization": f"Bearer {secret}"})
    state.close()
    (request,) = service.requests
    assert (request.allowance.live_cells, request.allowance.weight) == (None, 2.0)


async def test_more_than_its_tokens_a_minute_is_a_429_that_says_when() -> None:
    async with world(["one", "two"]) as at:
        at.state.tenants.limit("one", tokens_per_minute=100)
        client = at.openai("one")
        message: list[ChatCompletionMessageParam] = [{"role": "user", "content": "x" * 150}]
        await client.chat.completions.create(model="m", messages=message, max_tokens=2)
        with pytest.raises(openai.RateLimitError) as caught:
            await client.responses.create(model="m", input="y")
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 120
        assert caught.value.code == "rate_limit_exceeded"
        async with at.http("two") as other:
            assert (await other.post("/chat/completions", json=chat_body(max_tokens=1))).status_code == 200
        await client.close()


async def test_a_full_line_is_refused_and_a_stream_that_ends_makes_room() -> None:
    hold = asyncio.Event()
    service, state = StubService(hold=hold), State()
    secret, _ = state.tenants.add_key("small")
    state.tenants.limit("small", max_concurrent=1, max_queued=0)
    async with client_of(service, state) as client:
        client.headers["authorization"] = f"Bearer {secret}"
        first = asyncio.create_task(client.post(CHAT, json=chat_body(stream=True)))
        await asyncio.wait_for(service.begun.wait(), 10)
        refused = await client.post(CHAT, json=chat_body(stream=True))
        assert refused.status_code == 429
        assert error_of(refused)["type"] == "rate_limit_error"
        hold.set()
        assert (await first).status_code == 200
        assert (await client.post(CHAT, json=chat_body())).status_code == 200
    assert len(state.gate) == 0
    state.close()


async def test_every_reply_counts_and_a_call_for_more_than_may_ever_be_made_says_so() -> None:
    hold = asyncio.Event()
    service, state = StubService(hold=hold), State()
    secret, _ = state.tenants.add_key("small")
    state.tenants.limit("small", max_concurrent=4, max_queued=0)
    async with client_of(service, state) as client:
        client.headers["authorization"] = f"Bearer {secret}"
        for body in (chat_body(n=5), chat_body(n=5, stream=True)):
            refused = await client.post(CHAT, json=body)
            assert (refused.status_code, error_of(refused)["param"]) == (400, "n")
        refused = await client.post("/v1/completions", json={"prompt": ["a", "b", "c"], "n": 2})
        assert refused.status_code == 400
        assert not service.requests
        first = asyncio.create_task(client.post("/v1/completions", json={"prompt": ["a", "b", "c"]}))
        await asyncio.wait_for(service.begun.wait(), 10)
        assert (await client.post(CHAT, json=chat_body(n=2))).status_code == 429
        hold.set()
        assert (await client.post(CHAT, json=chat_body())).status_code == 200
        assert (await first).status_code == 200
    assert len(state.gate) == 0
    state.close()


async def test_requests_that_come_together_do_not_all_find_the_same_tokens() -> None:
    hold = asyncio.Event()
    service, state = StubService(hold=hold), State()
    secret, _ = state.tenants.add_key("small")
    state.tenants.limit("small", tokens_per_minute=100)
    async with client_of(service, state) as client:
        client.headers["authorization"] = f"Bearer {secret}"
        first = asyncio.create_task(client.post("/v1/completions", json={"prompt": "a", "max_tokens": 120}))
        await asyncio.wait_for(service.begun.wait(), 10)
        assert (await client.post("/v1/completions", json={"prompt": "b", "max_tokens": 120})).status_code == 429
        hold.set()
        assert (await first).status_code == 200
        assert (await client.post("/v1/completions", json={"prompt": "b", "max_tokens": 120})).status_code == 200
    state.close()


async def test_the_admin_key_opens_what_shows_everybodys_doing_and_nothing_else() -> None:
    state = State()
    secret, _ = state.tenants.add_key("one")
    async with client_of(StubService(), state, ApiSettings(admin_key="root")) as client:
        admin, user = {"authorization": "Bearer root"}, {"authorization": f"Bearer {secret}"}
        for path in ("/metrics", "/slots", "/v1/admin/tenants", "/v1/admin/public"):
            assert (await client.get(path, headers=admin)).status_code == 200
            for headers in (user, {}):
                answer = await client.get(path, headers=headers)
                assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")
        assert (await client.get("/v1/models", headers=admin)).status_code == 401
        assert (await client.get("/v1/models", headers=user)).status_code == 200
        changed = await client.post("/v1/admin/tenants/one/limits", json={"tokens_per_minute": 5}, headers=admin)
        assert changed.json()["limits"]["tokens_per_minute"] == 5
        assert changed.json()["limits"]["max_queued"] == 256
        assert (await client.post("/v1/admin/tenants/two/limits", json={}, headers=admin)).status_code == 404
        assert (await client.post("/v1/admin/tenants/one/limits", json={"weight": 0}, headers=admin)).status_code == 400
        assert (await client.post("/v1/admin/public", json={"name": "../x", "content": "c"}, headers=admin)).status_code == 400
        assert (await client.post("/v1/admin/public", json={"name": "x", "content": "c"}, headers=admin)).status_code == 201
        assert (await client.delete("/v1/admin/public/x", headers=admin)).status_code == 200
    state.close()


async def test_without_an_admin_key_a_tenant_sees_its_own_sequences() -> None:
    async with world(["one", "two"], settings=ApiSettings()) as at:
        seen = {}
        for name in ("one", "two"):
            async with at.http(name) as client:
                await client.post(
                    "/chat/completions", json=chat_body(max_tokens=1, messages=[{"role": "user", "content": name}])
                )
                seen[name] = (await client.get("http://pasture/slots")).json()
        assert [slot["id"] for slot in seen["one"]] != [slot["id"] for slot in seen["two"]]
        assert [len(slots) for slots in seen.values()] == [1, 1]
    async with world(["one"]) as at, at.http("one") as client:
        await client.post("/chat/completions", json=chat_body(max_tokens=1))
        slots = await client.get("http://pasture/slots", headers={"authorization": "Bearer admin"})
        assert len(slots.json()) == 1


async def test_without_an_admin_key_there_are_no_admin_routes(client: httpx.AsyncClient) -> None:
    for path in ("/v1/admin/tenants", "/v1/admin/nothing"):
        assert (await client.get(path)).status_code == 404
    assert (await client.get("/metrics")).status_code == 200


async def test_who_leaves_before_the_first_token_pays_for_the_prompt_and_who_is_refused_does_not() -> None:
    service, state = StubService(), State()
    secret, _ = state.tenants.add_key("one")
    state.tenants.limit("one", tokens_per_minute=1000)
    never = asyncio.Event()

    async def silent(_: Request) -> AsyncGenerator[TokenEvent, None]:
        await never.wait()
        yield TokenEvent(1)

    async def tokens_spent() -> float:
        app: Any = transport.app
        turnstile = app.state.gateway.state.gate._turnstiles.get("one")
        return 0.0 if turnstile is None else turnstile.bucket.spent

    transport = httpx.ASGITransport(create_app(service, state=state), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://pasture") as client:
        client.headers["authorization"] = f"Bearer {secret}"
        service.error = QueueFull("the line is full", retry_after_seconds=1)
        assert (await client.post(CHAT, json=chat_body())).status_code == 429
        assert await tokens_spent() == 0
        service.error, service.script = None, silent
        service.begun.clear()
        leaving = asyncio.create_task(client.post(CHAT, json=chat_body()))
        await service.begun.wait()
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        n_prompt = len(service.requests[-1].prompt)
        assert await tokens_spent() == pytest.approx(n_prompt, abs=1)
        service.script = None
        await client.post(CHAT, json=chat_body(n=3, max_tokens=2))
        assert await tokens_spent() == pytest.approx(2 * n_prompt + 3 * 2, abs=2), "a prompt is paid for once"
    state.close()
