"""Replies bound to a form, over HTTP and the engine without a model: every way to ask for one, and what is refused."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator

import httpx
import pytest

from pasture.api import create_app
from pasture.core.values import Constraint, ConstraintKind, PoolShape
from pasture.engine.fake import FakeEngine
from pasture.scheduler.service import LocalService
from tests.store_support import store_for
from tests.unit.api.wire import CHAT, COMPLETIONS, chat_body, chat_texts, error_of
from tests.unit.stub_service import StubService

RESPONSES = "/v1/responses"
SCHEMA = {
    "type": "object",
    "properties": {"open": {"type": "boolean"}, "why": {"enum": ["late", "early"]}},
    "required": ["open", "why"],
    "additionalProperties": False,
}
NAMED = {"name": "opening", "schema": SCHEMA, "strict": True}


@pytest.fixture
async def bound() -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server that draws what its constraint leaves."""
    engine = FakeEngine(PoolShape(4096, 16))
    service = LocalService(engine, store_for(engine))
    transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://pasture") as client:
        yield client
    await asyncio.to_thread(service.close)


def suits(text: str) -> bool:
    value = json.loads(text)
    return value.keys() == {"open", "why"} and isinstance(value["open"], bool) and value["why"] in ("late", "early")


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": NAMED}},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"response_format": {"type": "text"}, "json_schema": SCHEMA},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
    ],
)
async def test_a_schema_in_every_spelling_binds_chats_and_completions(
    bound: httpx.AsyncClient, fields: dict[str, object]
) -> None:
    chat = (await bound.post(CHAT, json=chat_body(**fields, max_tokens=400))).json()["choices"][0]
    plain = (await bound.post(COMPLETIONS, json={"prompt": "Hi", **fields, "max_tokens": 400})).json()["choices"][0]
    assert suits(chat["message"]["content"])
    assert suits(plain["text"])
    assert [chat["finish_reason"], plain["finish_reason"]] == ["stop", "stop"]


async def test_any_object_is_an_object(bound: httpx.AsyncClient) -> None:
    fields = {"response_format": {"type": "json_object"}, "max_tokens": 40, "logit_bias": {str(ord("}")): 100}}
    answer = (await bound.post(CHAT, json=chat_body(**fields))).json()["choices"][0]["message"]["content"]
    assert answer.startswith("{")


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"grammar": 'root ::= "yes" | "no" " "+ "!"'}, "yes|no +!"),
        ({"guided_regex": "[ab]{3,5}"}, "[ab]{3,5}"),
        ({"guided_choice": ["a.b", "one\ntwo", "(c)"]}, r"a\.b|one\ntwo|\(c\)"),
    ],
)
async def test_grammars_patterns_and_choices(bound: httpx.AsyncClient, fields: dict[str, object], pattern: str) -> None:
    choices = (await bound.post(CHAT, json=chat_body(**fields, n=4, seed=1))).json()["choices"]
    assert all(re.fullmatch(pattern, choice["message"]["content"]) for choice in choices)
    assert {choice["finish_reason"] for choice in choices} == {"stop"}


async def test_streams_are_bound_as_whole_answers_are(bound: httpx.AsyncClient) -> None:
    response = await bound.post(CHAT, json=chat_body(json_schema=SCHEMA, stream=True, n=3))
    assert all(map(suits, chat_texts(response.text).values()))


async def test_a_response_has_its_format(bound: httpx.AsyncClient) -> None:
    form = {"type": "json_schema", **NAMED}
    body = (await bound.post(RESPONSES, json={"input": "Hi", "text": {"format": form}})).json()
    assert suits(body["output"][0]["content"][0]["text"])
    assert body["text"]["format"] == form
    body = (await bound.post(RESPONSES, json={"input": "Hi", "guided_choice": ["a"]})).json()
    assert body["output"][0]["content"][0]["text"] == "a"


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs a schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}, "response_format", "object"),
        ({"response_format": {"type": "xml"}}, "response_format", "'xml'"),
        ({"response_format": {"type": "json_object", "schema": {"type": "colour"}}}, "response_format", "Invalid type"),
        ({"json_schema": {"not": {}}}, "json_schema", "Unimplemented"),
        ({"json_schema": "x"}, "json_schema", "dict"),
        ({"guided_json": "{"}, "guided_json", "cannot be used"),
        ({"grammar": "root ::= x"}, "grammar", "not found"),
        ({"guided_regex": "("}, "guided_regex", "unclosed"),
        ({"guided_choice": []}, "guided_choice", "at least 1"),
        ({"guided_choice": ["x" * 70_000]}, "guided_choice", "bytes"),
        ({"guided_grammar": "root ::= x"}, "guided_grammar", "grammar"),
        ({"grammar": 'root ::= "x"', "guided_regex": "x"}, "guided_regex", "grammar and guided_regex"),
        ({"response_format": {"type": "json_object"}, "json_schema": SCHEMA}, "json_schema", "at once"),
        ({"json_schema": SCHEMA, "ignore_eos": True}, "ignore_eos", "bound"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_no_form_is_refused_by_name(
    bound: httpx.AsyncClient, fields: dict[str, object], param: str, told: str, stream: bool
) -> None:
    response = await bound.post(CHAT, json=chat_body(**fields, stream=stream))
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["param"].split(".")[0] == param
    assert told in error["message"]


async def test_a_schema_deeper_than_anybody_writes_is_refused(bound: httpx.AsyncClient) -> None:
    for depth in (150, 600):
        schema = '{"items":' * depth + "{}" + "}" * depth
        body = f'{{"messages": [{{"role": "user", "content": "Hi"}}], "json_schema": {schema}}}'
        response = await bound.post(CHAT, content=body)
        assert response.status_code == 400, response.text
        assert re.search("deep|depth", error_of(response)["message"])


async def test_a_responses_format_is_refused_under_its_own_name(bound: httpx.AsyncClient) -> None:
    for form in ({"type": "json_schema"}, {"type": "json_schema", "schema": {"type": "colour"}}, 5):
        response = await bound.post(RESPONSES, json={"input": "Hi", "text": {"format": form}})
        assert response.status_code == 400
        assert error_of(response)["param"] == "text.format"


async def test_the_constraint_reaches_the_service_as_it_was_said(client: httpx.AsyncClient, service: StubService) -> None:
    await client.post(CHAT, json=chat_body(json_schema={"b": 1, "a": 2}))
    await client.post(CHAT, json=chat_body(grammar="", json_schema=None))
    found = [request.sampling.constraint for request in service.requests]
    assert found == [Constraint(ConstraintKind.JSON_SCHEMA, '{"b":1,"a":2}'), None]
    assert "constraint" not in (await client.get("/props")).json()["default_generation_settings"]["params"]
