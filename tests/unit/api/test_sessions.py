"""Sessions over HTTP, with a scripted service, and with the fake engine where the cache matters."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import httpx
import pytest

from pasture.api import keepers
from pasture.api.joining import whole
from pasture.api.keepers import MAX_TRAVELLING_OF_TENANT
from pasture.core.errors import DeadlineExceeded, EngineError, PastureError, RequestError, ShuttingDown
from pasture.core.values import Finish, FinishReason, Request, TokenEvent, Usage
from pasture.sessions.state import State
from pasture.sessions.values import Limits, Tenant
from tests.session_support import GREEDY, answer_to, assert_says_full, full, world
from tests.unit.api.conftest import Connect
from tests.unit.api.test_limits import client_of
from tests.unit.api.wire import CHAT, chat_texts, error_of
from tests.unit.stub_service import StubService

SESSIONS = "/v1/sessions"
SYSTEM = {"role": "system", "content": "S"}
HI = {"role": "user", "content": "Hi"}
MORE = {"role": "user", "content": "More"}
HELLO = {"role": "assistant", "content": "Hello there"}


async def new_session(client: httpx.AsyncClient, *messages: Mapping[str, str], **fields: object) -> str:
    answer = await client.post(SESSIONS, json={"messages": messages, **fields})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def said(client: httpx.AsyncClient, session_id: str) -> Any:
    return (await client.get(f"{SESSIONS}/{session_id}?messages=true")).json()["messages"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("by_header", [False, True])
async def test_inside_a_session_only_new_messages_are_sent(client: httpx.AsyncClient, stream: bool, by_header: bool) -> None:
    session_id = await new_session(client, SYSTEM)
    place = {} if by_header else {"session_id": session_id}
    headers = {"x-session-id": session_id} if by_header else {}
    for message in (HI, MORE):
        answer = await client.post(CHAT, json={"messages": [message], "stream": stream, **place}, headers=headers)
        assert answer.status_code == 200, answer.text
        assert not stream or chat_texts(answer.text) == {0: "Hello there"}
    assert await said(client, session_id) == [SYSTEM, HI, HELLO, MORE, HELLO]
    shown = (await client.get(f"{SESSIONS}/{session_id}")).json()
    assert shown["usage"] == {"requests": 2, "prompt_tokens": 100, "cached_tokens": 6, "reply_tokens": 22}
    assert shown["cache"]["tiers"]["ram"] == 5
    assert shown["n_messages"] == 5


@pytest.mark.parametrize(
    ("mode", "sent", "meant"),
    [
        ("auto", [MORE], [SYSTEM, HI, HELLO, MORE]),
        ("auto", [SYSTEM, HI, HELLO, MORE], [SYSTEM, HI, HELLO, MORE]),
        ("auto", [SYSTEM, MORE], [SYSTEM, MORE]),
        ("auto", [HI, {"role": "assistant", "content": "edited"}, MORE], None),
        ("append", [SYSTEM, MORE], [SYSTEM, HI, HELLO, SYSTEM, MORE]),
        ("replace", [MORE], [MORE]),
    ],
)
def test_what_a_client_means(mode: str, sent: list[dict[str, str]], meant: list[dict[str, str]] | None) -> None:
    assert whole([SYSTEM, HI, HELLO], sent, mode) == (sent if meant is None else meant)
    assert whole([], sent, mode) == sent


def test_another_system_message_alone_does_not_end_a_conversation() -> None:
    sent = [{"role": "system", "content": "It is Tuesday."}, MORE]
    with pytest.raises(RequestError, match="session_mode"):
        whole([SYSTEM, HI, HELLO], sent, "auto")
    assert whole([SYSTEM, HI], sent, "auto") == sent, "nobody has answered yet: nothing is lost"
    assert whole([SYSTEM, HI, HELLO], [sent[0], HI, HELLO, MORE], "auto")[0] == sent[0]


async def test_a_session_remembers_its_tools(connect: Connect) -> None:
    service = StubService()
    service.vocabulary.chat_template = "{{ tools }}|{{ x }}|{% for m in messages %}{{ m.content }}{% endfor %}"
    client = connect(service)
    session_id = await new_session(client, tools=[{"name": "t"}], chat_template_kwargs={"x": "why"})
    await client.post(CHAT, json={"messages": [HI], "session_id": session_id})
    assert bytes(service.requests[0].prompt) == b"[{'name': 't'}]|why|Hi"


async def test_a_name_makes_a_session_and_never_changes_a_prompt(client: httpx.AsyncClient, service: StubService) -> None:
    for _ in range(2):
        await client.post(CHAT, json={"messages": [HI], "prompt_cache_key": "mine"})
    await client.post(CHAT, json={"messages": [HI]}, headers={"x-session-id": "mine"})
    assert len({request.prompt for request in service.requests}) == 1
    (only,) = (await client.get(SESSIONS)).json()["data"]
    assert (only["name"], only["n_messages"], only["usage"]["requests"]) == ("mine", 2, 3)


@pytest.mark.parametrize("by_header", [False, True])
async def test_a_named_session_goes_on_with_new_messages_where_that_is_said(client: httpx.AsyncClient, by_header: bool) -> None:
    body = {"session_mode": "append"} | ({} if by_header else {"prompt_cache_key": "mine"})
    headers = {"x-session-id": "mine"} if by_header else {}
    for message in (HI, MORE):
        answer = await client.post(CHAT, json={"messages": [message], **body}, headers=headers)
        assert answer.status_code == 200, answer.text
    (only,) = (await client.get(SESSIONS)).json()["data"]
    assert only["name"] == "mine"
    assert await said(client, only["id"]) == [HI, HELLO, MORE, HELLO]
    replaced = await client.post(CHAT, json={"messages": [MORE], "prompt_cache_key": "mine"})
    assert replaced.status_code == 200
    assert await said(client, only["id"]) == [MORE, HELLO], "who says nothing has sent the whole conversation"


async def test_two_requests_do_not_begin_one_named_session(connect: Connect) -> None:
    hold = asyncio.Event()
    service = StubService(hold=hold)
    client = connect(service)
    body = {"messages": [HI], "prompt_cache_key": "mine", "session_mode": "append"}
    first = asyncio.create_task(client.post(CHAT, json=body))
    await asyncio.wait_for(service.begun.wait(), 10)
    assert (await client.post(CHAT, json=body)).status_code == 409
    hold.set()
    assert (await first).status_code == 200
    assert (await client.post(CHAT, json=body)).status_code == 200


async def test_who_asks_for_a_named_session_hears_that_a_reply_cannot_be_kept() -> None:
    service, state = StubService(), State(limits=Limits(max_transcript_bytes=400, max_sessions=1))
    async with client_of(service, state) as client:
        body = {"prompt_cache_key": "mine", "session_mode": "append"}
        large = await client.post(CHAT, json={"messages": [{"role": "user", "content": "x" * 400}], **body})
        assert (large.status_code, error_of(large)["code"]) == (429, "rate_limit_exceeded")
        tools = [{"type": "function", "function": {"name": "look", "description": "x" * 400}}]
        assert (await client.post(CHAT, json={"messages": [HI], "tools": tools, **body})).status_code == 429
        assert not service.requests
        await new_session(client)
        assert (await client.post(CHAT, json={"messages": [HI], **body})).status_code == 429, "no room for another session"
    state.close()


async def test_two_requests_do_not_go_on_from_one_end(connect: Connect) -> None:
    hold = asyncio.Event()
    service = StubService(hold=hold)
    client = connect(service)
    session_id = await new_session(client)
    body = {"messages": [HI], "session_id": session_id}
    first = asyncio.create_task(client.post(CHAT, json=body))
    await asyncio.wait_for(service.begun.wait(), 10)
    answer = await client.post(CHAT, json=body)
    assert answer.status_code == 409
    assert error_of(answer)["code"] == "conflict"
    hold.set()
    assert (await first).status_code == 200
    assert (await client.post(CHAT, json=body)).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("leave", "status"), [("truncate", 409), ("delete", 404)])
async def test_who_joined_a_session_that_is_another_one_now_hears_it_before_there_is_a_reply(
    leave: str, status: int, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, state = StubService(), State()
    async with client_of(service, state) as client:
        session_id = await new_session(client, SYSTEM)

        def meanwhile(tenant: Tenant, *_: object) -> None:
            if leave == "truncate":
                state.sessions.truncate(tenant, session_id, 0)
            else:
                state.sessions.delete(tenant, session_id)

        monkeypatch.setattr(state.sessions, "check_room", meanwhile)
        answer = await client.post(CHAT, json={"messages": [HI], "session_id": session_id, "stream": stream})
        assert answer.status_code == status, answer.text
        assert not service.requests
    state.close()


async def test_an_answer_that_failed_leaves_the_session_as_it_was(connect: Connect) -> None:
    service = StubService()
    client = connect(service)
    session_id = await new_session(client, SYSTEM)
    service.error = RuntimeError("broken")
    assert (await client.post(CHAT, json={"messages": [HI], "session_id": session_id})).status_code == 500
    service.error = None
    assert await said(client, session_id) == [SYSTEM]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_reply_is_answered_where_a_session_that_was_only_named_cannot_be_kept(
    stream: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    state = State()
    async with client_of(StubService(), state) as client:
        session_id = await new_session(client, SYSTEM)
        monkeypatch.setattr(state.database, "write", full)
        with caplog.at_level(logging.WARNING, "pasture.api"):
            answers = [
                await client.post(CHAT, json={"messages": [HI], "stream": stream, **named}, headers=headers)
                for named, headers in (({"prompt_cache_key": "mine"}, {}), ({}, {"x-session-id": "mine"}))
            ]
        for answer in answers:
            assert answer.status_code == 200, answer.text
            assert "error" not in answer.text
        assert_says_full(caplog.text)
        if not stream:
            asked = await client.post(CHAT, json={"messages": [HI], "session_id": session_id})
            assert asked.status_code == 500, "who asked for a session hears that it has not gone on"
    state.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_where_no_reply_could_be_kept_none_is_computed(stream: bool) -> None:
    service, state = StubService(), State(limits=Limits(max_transcript_bytes=400))
    async with client_of(service, state) as client:
        session_id = await new_session(client, SYSTEM, {"role": "user", "content": "x" * 250})
        body = {"session_id": session_id, "stream": stream}
        answer = await client.post(CHAT, json={"messages": [{"role": "user", "content": "y" * 30}], **body})
        assert (answer.status_code, error_of(answer)["code"]) == (429, "rate_limit_exceeded")
        assert not service.requests
        shorter = await client.post(CHAT, json={"messages": [SYSTEM, HI], "session_mode": "replace", **body})
        assert shorter.status_code == 200, "what is replaced makes room"
        assert await said(client, session_id) == [SYSTEM, HI, HELLO]
        await new_session(client, {"role": "user", "content": "x" * (400 - 190)})
        named = await client.post(CHAT, json={"messages": [HI], "prompt_cache_key": "mine", "stream": stream})
        assert named.status_code == 200
        assert len((await client.get(SESSIONS)).json()["data"]) == 2, "what has no room is answered, and not kept"
    state.close()


async def test_what_is_not_there_is_said_in_one_shape(client: httpx.AsyncClient) -> None:
    for method, path in (
        ("GET", ""),
        ("DELETE", ""),
        ("POST", "/fork"),
        ("POST", "/export"),
        ("POST", "/pin"),
        ("POST", "/unpin"),
        ("POST", "/prefetch"),
    ):
        answer = await client.request(method, f"{SESSIONS}/sess_x{path}")
        assert answer.status_code == 404
        assert error_of(answer)["message"] == "there is no session 'sess_x'"
    answer = await client.post(CHAT, json={"messages": [HI], "session_id": "sess_x"})
    assert error_of(answer)["code"] == "not_found"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (SESSIONS, {"messages": "x"}),
        (SESSIONS, {"nonsense": 1}),
        (SESSIONS, {"name": ""}),
        (SESSIONS, {"metadata": {"k": {"deep": 1}}}),
        (SESSIONS, {"metadata": {"k": "v" * 513}}),
        (SESSIONS, {"metadata": {"k" * 65: "v"}}),
        (SESSIONS, {"metadata": {str(i): "v" for i in range(17)}}),
        (f"{SESSIONS}/ID/fork", {"n": 0}),
        (f"{SESSIONS}/ID/fork", {"n": 1000}),
        (f"{SESSIONS}/ID/truncate", {}),
        (f"{SESSIONS}/ID/truncate", {"messages": 9}),
        (f"{SESSIONS}/ID/truncate", {"messages": 1, "tokens": 1}),
        (f"{SESSIONS}/ID/copy", {}),
        (CHAT, {"messages": [HI], "session_id": "ID", "n": 2}),
        (CHAT, {"messages": [HI], "session_mode": "append"}),
        (CHAT, {"messages": [HI], "session_mode": "append", "prompt_cache_key": "mine", "n": 2}),
        (CHAT, {"messages": [HI], "service_tier": "gold"}),
    ],
)
async def test_what_cannot_be_meant_is_a_400(client: httpx.AsyncClient, path: str, body: dict[str, object]) -> None:
    session_id = await new_session(client, SYSTEM)
    body = {key: session_id if value == "ID" else value for key, value in body.items()}
    answer = await client.post(path.replace("ID", session_id), json=body)
    assert answer.status_code == 400, answer.text
    error_of(answer)
    assert (await client.get(f"{SESSIONS}?limit=0")).status_code == 400
    assert (await client.get(f"{SESSIONS}/{session_id}?messages=perhaps")).status_code == 400


async def test_pins_are_released_with_what_they_pin(client: httpx.AsyncClient, service: StubService) -> None:
    session_id = await new_session(client, SYSTEM)
    assert (await client.post(f"{SESSIONS}/{session_id}/pin")).json()["expires_at"] is None
    await client.post(f"{SESSIONS}/{session_id}/pin")
    assert [pin.released for pin in service.pins] == [True, False]
    await client.post(f"{SESSIONS}/{session_id}/unpin")
    await client.post(f"{SESSIONS}/{session_id}/pin")
    await client.delete(f"{SESSIONS}/{session_id}")
    assert all(pin.released for pin in service.pins)


async def test_a_session_can_be_brought_into_ram_alone(client: httpx.AsyncClient, service: StubService) -> None:
    session_id = await new_session(client, SYSTEM, HI)
    answer = (await client.post(f"{SESSIONS}/{session_id}/prefetch?live=false")).json()
    assert [len(tokens) for tokens in service.lifted] == [answer["tokens"]]
    assert answer["cached_tokens"] == answer["tokens"], "what the stub has live"
    assert not service.requests, "nothing is computed for it"


@pytest.mark.parametrize(
    ("error", "status"), [(EngineError("broken"), 500), (ShuttingDown("closing"), 503), (DeadlineExceeded("late"), 408)]
)
async def test_what_was_not_brought_into_the_live_cache_is_not_said_to_be(
    connect: Connect, error: PastureError, status: int
) -> None:
    async def failing(request: Request) -> AsyncGenerator[TokenEvent, None]:
        yield TokenEvent(None, finish=Finish(FinishReason.ERROR, Usage(len(request.prompt), 3, 0), error))

    client = connect(StubService(script=failing))
    session_id = await new_session(client, SYSTEM, HI)
    assert (await client.post(f"{SESSIONS}/{session_id}/prefetch")).status_code == status


async def test_a_conversation_is_cut_at_a_message_or_a_token(client: httpx.AsyncClient) -> None:
    session_id = await new_session(client, SYSTEM, HI, HELLO)
    path = f"{SESSIONS}/{session_id}/truncate"
    assert (await client.post(path, json={"tokens": 26})).json()["n_messages"] == 2
    assert (await client.post(path, json={"messages": 1})).json()["n_messages"] == 1
    assert await said(client, session_id) == [SYSTEM]


async def test_a_fork_goes_its_own_way_over_the_same_cells() -> None:
    async with world(["one"], settings=replace(GREEDY, turn_ahead=False)) as at, at.http("one") as client:
        made = (await client.post("/sessions", json={"messages": [{"role": "system", "content": "Be kind. " * 50}]})).json()
        await client.post(f"/sessions/{made['id']}/prefetch")
        forks = (await client.post(f"/sessions/{made['id']}/fork", json={"n": 8})).json()["data"]
        before = at.service.statistics().pool.used_cells
        bodies = [
            {"messages": [{"role": "user", "content": f"{i} is my number"}], "session_id": fork["id"], "max_tokens": 4}
            for i, fork in enumerate(forks)
        ]
        answers = await asyncio.gather(*(client.post("/chat/completions", json=body) for body in bodies))
        cached = [answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
        assert min(cached) > 450
        assert at.service.statistics().pool.peak_cells - before < 8 * 40, "only what they say differs has cells of its own"
        shown = (await client.get(f"/sessions/{forks[0]['id']}")).json()
        assert shown["cache"]["shared_cells"] > 450
        assert shown["lineage"] == {"parent": made["id"], "messages": 1}


async def test_a_session_moves_to_another_tenant_whose_key_one_has() -> None:
    async with world(["one", "two"]) as at, at.http("one") as one, at.http("two") as two:
        made = (await one.post("/sessions", json={"messages": [SYSTEM]})).json()["id"]
        assert (await one.post(f"/sessions/{made}/copy", json={"target_key": "wrong"})).status_code == 404
        copied = (await one.post(f"/sessions/{made}/copy", json={"target_key": at.keys["two"]})).json()["id"]
        moved = (await one.post(f"/sessions/{made}/move", json={"target_key": at.keys["two"]})).json()["id"]
        for session_id in (copied, moved):
            assert (await two.get(f"/sessions/{session_id}?messages=true")).json()["messages"] == [SYSTEM]
            assert (await one.get(f"/sessions/{session_id}")).status_code == 404
        assert (await one.get(f"/sessions/{made}")).status_code == 404


async def test_an_export_goes_on_at_another_server_without_computing_anew() -> None:
    system = {"role": "system", "content": "Be kind. " * 40}
    async with world(["one"]) as here, here.http("one") as client:
        made = (await client.post("/sessions", json={"messages": [system]})).json()["id"]
        await client.post("/chat/completions", json={"messages": [HI], "session_id": made, "max_tokens": 4})
        exported = (await client.post(f"/sessions/{made}/export")).content
        bare = (await client.post(f"/sessions/{made}/export?blocks=false")).content
        messages = (await client.get(f"/sessions/{made}?messages=true")).json()["messages"]
    assert len(bare) < len(exported)
    async with world(["other"]) as there, there.http("other") as client:
        taken = (await client.post("/sessions/import", content=exported)).json()
        assert taken["restored_tokens"] > 350
        body = {"messages": [MORE], "session_id": taken["id"], "max_tokens": 4}
        answer = (await client.post("/chat/completions", json=body)).json()
        assert answer["choices"][0]["message"]["content"] == answer_to([*messages, MORE], 4)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 350


async def test_limits_on_what_is_stored_hold_for_a_tenant_that_has_only_imported() -> None:
    system = {"role": "system", "content": "Be kind. " * 40}
    async with world(["one"]) as here, here.http("one") as client:
        made = (await client.post("/sessions", json={"messages": [system]})).json()["id"]
        await client.post("/chat/completions", json={"messages": [HI], "session_id": made, "max_tokens": 4})
        exported = (await client.post(f"/sessions/{made}/export")).content
        held = here.service.statistics().store.tiers[0].bytes
    async with world(["small"]) as there, there.http("small") as client:
        there.state.tenants.limit("small", max_ram_bytes=held // 2)
        assert (await client.post("/sessions/import", content=exported)).status_code == 201
        assert 0 < there.service.statistics().store.tiers[0].bytes <= held // 2


async def test_whatever_brings_a_tenants_kv_in_says_what_it_may_hold() -> None:
    service, state = StubService(), State()
    secret, _ = state.tenants.add_key("small")
    tenant = state.tenants.limit("small", max_ram_bytes=1000)
    async with client_of(service, state) as client:
        client.headers["authorization"] = f"Bearer {secret}"
        session_id = await new_session(client, SYSTEM, HI)
        exported = (await client.post(f"{SESSIONS}/{session_id}/export")).content
        for path, content in (
            (f"{SESSIONS}/{session_id}/prefetch?live=false", b""),
            (f"{SESSIONS}/{session_id}/pin", b""),
            (f"{SESSIONS}/import", exported),
            ("/v1/chat/prefetch", b'{"messages": [{"role": "user", "content": "Hello. "}]}'),
        ):
            service.allowed.clear()
            assert (await client.post(path, content=content)).is_success
            assert service.allowed == {tenant.namespace(): tenant.allowance()}, path
    state.close()


async def test_another_models_export_is_refused_unless_adopted(client: httpx.AsyncClient) -> None:
    session_id = await new_session(client, SYSTEM, HI)
    exported = (await client.post(f"{SESSIONS}/{session_id}/export")).content
    async with world(["other"]) as there, there.http("other") as other:
        refused = await other.post("/sessions/import", content=exported)
        assert refused.status_code == 409
        assert "another model" in error_of(refused)["message"]
        adopted = (await other.post("/sessions/import?adopt=true", content=exported)).json()
        assert (adopted["n_messages"], adopted["restored_tokens"]) == (2, 0)
    assert (await client.post(f"{SESSIONS}/import", content=b"nonsense")).status_code == 400


async def test_a_tenant_sends_a_few_files_at_once_and_waits_beyond_or_is_told_to(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = await new_session(client, SYSTEM, HI)
    exported = (await client.post(f"{SESSIONS}/{session_id}/export?blocks=false")).content
    arrived, go_on = asyncio.Semaphore(0), asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        arrived.release()
        yield exported[:10]
        await go_on.wait()
        yield exported[10:]

    slow = [asyncio.create_task(client.post(f"{SESSIONS}/import", content=slowly())) for _ in range(MAX_TRAVELLING_OF_TENANT)]
    for _ in slow:
        await arrived.acquire()
    patient = asyncio.create_task(client.post(f"{SESSIONS}/import", content=exported))
    await asyncio.sleep(0.05)
    monkeypatch.setattr(keepers, "TRAVEL_PATIENCE_SECONDS", 0.05)
    refused = await client.post(f"{SESSIONS}/import", content=exported)
    assert refused.status_code == 429
    assert error_of(refused)["code"] == "rate_limit_exceeded"
    assert not patient.done()
    go_on.set()
    assert {(await task).status_code for task in (*slow, patient)} == {201}
    assert (await client.post(f"{SESSIONS}/import", content=exported)).status_code == 201
