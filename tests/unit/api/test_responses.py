"""`/v1/responses` with the official client, in process."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator

import httpx
import openai
import pytest
from openai.types.responses import Response

from pasture.core.errors import EngineError
from pasture.core.values import Request, TokenEvent
from pasture.sessions.state import State
from tests.session_support import answer_to, assert_says_full, full, world
from tests.unit.api.conftest import Connect
from tests.unit.api.test_limits import client_of
from tests.unit.api.wire import error_of
from tests.unit.stub_service import StubService

RESPONSES = "/v1/responses"
LONG = "Read this first. " * 60


async def test_the_second_turn_sends_its_own_text_and_computes_little_else() -> None:
    async with world(["one"]) as at:
        client = at.openai("one")
        first = await client.responses.create(model="m", input=LONG, max_output_tokens=8)
        second = await client.responses.create(model="m", input="And now?", previous_response_id=first.id, max_output_tokens=8)
        said = [
            {"role": "user", "content": LONG},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "And now?"},
        ]
        assert first.output_text == answer_to(said[:1], 8)
        assert second.output_text == answer_to(said, 8)
        assert second.usage is not None
        assert second.usage.input_tokens_details.cached_tokens > 1000
        assert await client.responses.retrieve(second.id) == second
        assert second.previous_response_id == first.id
        await client.close()


async def test_a_response_tells_where_its_prompt_was_to_whoever_asks() -> None:
    async with world(["one"]) as at, at.http("one") as client:
        body = {"input": LONG, "instructions": "Be brief.", "max_output_tokens": 4, "pasture": True}
        first = (await client.post("/responses", json=body)).json()
        cache = first["pasture"]["choices"][0]["cache"]
        assert (cache["cached_tokens"], cache["reason"]) == (0, "new")
        assert "pasture" not in (await client.get(f"/responses/{first['id']}")).json()
        body |= {"input": "And now?", "previous_response_id": first["id"], "stream": True}
        streamed = (await client.post("/responses", json=body)).text
        last = json.loads(streamed.strip().splitlines()[-1].removeprefix("data: "))["response"]
        assert last["pasture"]["choices"][0]["cache"]["found"]["live"] > 1000
        body |= {"instructions": "Be kind.", "stream": False}
        cache = (await client.post("/responses", json=body)).json()["pasture"]["choices"][0]["cache"]
        assert (cache["reason"], cache["first_edited_message"]) == ("edited_history", 0)
        del body["pasture"]
        assert "pasture" not in (await client.post("/responses", json=body)).json()


async def test_a_stream_tells_the_same_in_openais_events() -> None:
    async with world(["one"]) as at:
        client = at.openai("one")
        whole = await client.responses.create(model="m", input="Hi", max_output_tokens=8)
        events = [
            event async for event in await client.responses.create(model="m", input="Hi", max_output_tokens=8, stream=True)
        ]
        kinds = [event.type for event in events]
        assert kinds[:4] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ]
        assert kinds[-4:-1] == ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
        assert set(kinds[4:-4]) == {"response.output_text.delta"}
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
        last = events[-1]
        assert last.type in ("response.completed", "response.incomplete")
        assert last.response.output_text == whole.output_text
        stored = await client.responses.retrieve(last.response.id)
        assert stored == last.response
        await client.close()


async def test_the_clients_own_reader_of_streams_understands_ours(client: httpx.AsyncClient) -> None:
    async with (
        openai.AsyncOpenAI(base_url="http://pasture/v1", api_key="x", http_client=client, max_retries=0) as official,
        official.responses.stream(model="m", input="Hi") as stream,
    ):
        assert (await stream.get_final_response()).output_text == "Hello there"


async def test_instructions_are_of_one_request_and_items_become_messages(connect: Connect) -> None:
    service = StubService()
    client = connect(service)
    first = (await client.post(RESPONSES, json={"input": "a", "instructions": "I"})).json()
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "D"}]},
        {"type": "reasoning", "summary": []},
        {"role": "user", "content": "b"},
    ]
    await client.post(RESPONSES, json={"input": items, "previous_response_id": first["id"]})
    prompt = bytes(token for token in service.requests[-1].prompt if token < 256)
    assert prompt == b"user\na\nassistant\nHello there\nsystem\nD\nuser\nb\nassistant\n"
    assert bytes(token for token in service.requests[0].prompt if token < 256) == b"system\nI\nuser\na\nassistant\n"


async def test_what_was_cut_short_says_so(connect: Connect) -> None:
    answer = (await connect(StubService()).post(RESPONSES, json={"input": "a", "max_output_tokens": 3})).json()
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert Response.model_validate(answer, strict=False).output_text == "Hel"


async def test_what_is_not_to_be_stored_is_not(client: httpx.AsyncClient) -> None:
    answer = (await client.post(RESPONSES, json={"input": "a", "store": False})).json()
    assert answer["store"] is False
    assert (await client.get(f"{RESPONSES}/{answer['id']}")).status_code == 404
    kept = (await client.post(RESPONSES, json={"input": "a"})).json()
    assert (await client.delete(f"{RESPONSES}/{kept['id']}")).json()["deleted"] is True
    again = await client.post(RESPONSES, json={"input": "b", "previous_response_id": kept["id"]})
    assert again.status_code == 404


@pytest.mark.parametrize("stream", [False, True])
async def test_what_cannot_be_kept_is_answered_where_nobody_asked_to_keep_it(
    stream: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    state = State()
    async with client_of(StubService(), state) as client:
        monkeypatch.setattr(state.database, "write", full)
        with caplog.at_level(logging.WARNING, "pasture.api"):
            answer = await client.post(RESPONSES, json={"input": "a", "stream": stream})
        assert answer.status_code == 200, answer.text
        body = json.loads(answer.text.strip().rsplit("\ndata: ", 1)[1])["response"] if stream else answer.json()
        assert (body["status"], body["store"], body["output"][0]["content"][0]["text"]) == ("completed", False, "Hello there")
        assert (await client.get(f"{RESPONSES}/{body['id']}")).status_code == 404
        assert_says_full(caplog.text)
        if not stream:
            assert (await client.post(RESPONSES, json={"input": "a", "store": True})).status_code == 500
    state.close()


@pytest.mark.parametrize(("fields", "status"), [({}, 200), ({"store": True}, 404)])
async def test_what_goes_on_from_a_response_that_is_deleted_meanwhile(fields: dict[str, bool], status: int) -> None:
    service, state = StubService(), State()
    async with client_of(service, state) as client:
        first = (await client.post(RESPONSES, json={"input": "a"})).json()["id"]
        service.hold, service.begun = asyncio.Event(), asyncio.Event()
        body = {"input": "b", "previous_response_id": first, **fields}
        second = asyncio.create_task(client.post(RESPONSES, json=body))
        await asyncio.wait_for(service.begun.wait(), 10)
        await client.delete(f"{RESPONSES}/{first}")
        service.hold.set()
        answer = await second
        assert answer.status_code == status, answer.text
        assert status == 404 or answer.json()["store"] is False
    state.close()


async def broken_midway(request: Request) -> AsyncGenerator[TokenEvent, None]:
    yield TokenEvent(ord("a"))
    raise EngineError("out of order")


async def test_an_error_has_a_status_before_a_stream_and_an_event_within_it(connect: Connect) -> None:
    client = connect(StubService(error=RuntimeError("broken")))
    assert (await client.post(RESPONSES, json={"input": "a", "stream": True})).status_code == 500
    missing = await client.post(RESPONSES, json={"input": "a", "stream": True, "previous_response_id": "resp_none"})
    assert missing.status_code == 404
    client = connect(StubService(script=broken_midway))
    text = (await client.post(RESPONSES, json={"input": "a", "stream": True})).text
    last = json.loads(text.strip().rsplit("\ndata: ", 1)[1])
    assert last["type"] == "response.failed"
    assert last["response"]["error"]["code"] == "engine_error"
    assert (await client.get(f"{RESPONSES}/{last['response']['id']}")).status_code == 404


@pytest.mark.parametrize(
    "fields",
    [
        {"background": True},
        {"conversation": "c"},
        {"prompt": {"id": "p"}},
        {"truncation": "auto"},
        {"text": {"format": {"type": "json_schema"}}},
        {"tools": [{"type": "web_search"}]},
        {"input": [{"type": "item_reference", "id": "x"}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        {"input": []},
        {"input": 5},
        {"top_logprobs": 3},
        {"temperature": -1},
    ],
)
async def test_what_cannot_be_honoured_is_refused_by_name(client: httpx.AsyncClient, fields: dict[str, object]) -> None:
    answer = await client.post(RESPONSES, json={"input": "a", **fields})
    assert answer.status_code == 400, answer.text
    error_of(answer)


async def test_the_client_reads_our_errors_as_its_own() -> None:
    async with world(["one"]) as at:
        client = at.openai("one")
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve("resp_nothing")
        with pytest.raises(openai.BadRequestError):
            await client.responses.create(model="m", input="x", truncation="auto")
        await client.close()
