"""Tool calls over HTTP: taken out of replies, streamed, kept in sessions as messages, and forced."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

from pasture.api import ApiSettings, create_app
from pasture.core.values import PoolShape
from pasture.engine.fake import FakeEngine
from pasture.scheduler.service import LocalService
from tests.store_support import store_for
from tests.unit.api.conftest import Connect
from tests.unit.api.wire import CHAT, chat_body, error_of, events
from tests.unit.stub_service import StubService

HERMES = (
    "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}"
    """{{ '\n<tool_call>\n' }}{"name": {{ c.function.name | tojson }}, "arguments": {{ c.function.arguments | tojson }}}"""
    "{{ '\n</tool_call>' }}{% endfor %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LLAMA = "{# ipython #}" + HERMES.replace("<tool_call>", "").replace("</tool_call>", "").replace('"arguments"', '"parameters"')
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"$ref": "#/$defs/City"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
                "required": ["city", "days"],
                "additionalProperties": False,
                "$defs": {"City": {"enum": ["Lima", "Oslo"]}},
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'
ARGUMENTS = '{"city": "Oslo", "days": 2}'


def asked(**fields: object) -> dict[str, object]:
    return chat_body(tools=TOOLS, **fields)


def speaking(connect: Connect, reply: str, template: str = HERMES) -> tuple[StubService, httpx.AsyncClient]:
    service = StubService(reply=reply)
    return service, connect(service, ApiSettings(chat_template=template))


async def test_calls_are_taken_out_of_a_reply(connect: Connect) -> None:
    _, client = speaking(connect, f"Let me see.\n{CALL}\n{CALL}")
    choice = (await client.post(CHAT, json=asked())).json()["choices"][0]
    calls = choice["message"]["tool_calls"]
    assert choice["message"] == {"role": "assistant", "content": "Let me see.", "refusal": None, "tool_calls": calls}
    assert [call["function"] for call in calls] == [{"name": "weather", "arguments": ARGUMENTS}] * 2
    assert [call["type"] for call in calls] == ["function", "function"]
    assert len({call["id"] for call in calls}) == 2
    assert all(call["id"].startswith("call_") for call in calls)
    assert choice["finish_reason"] == "tool_calls"


async def test_a_reply_that_is_nothing_but_a_call_has_no_content(connect: Connect) -> None:
    _, client = speaking(connect, '{"name": "now", "parameters": {}}', LLAMA)
    message = (await client.post(CHAT, json=asked())).json()["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}


async def test_a_stream_sends_text_at_once_and_calls_when_they_are_complete(connect: Connect) -> None:
    _, client = speaking(connect, f"See:\n{CALL}\n{CALL}")
    response = await client.post(CHAT, json=asked(stream=True))
    choices = [event["choices"][0] for event in events(response.text)[:-1]]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "See:"
    calls: list[Any] = [call for choice in choices for call in choice["delta"].get("tool_calls", ())]
    assert [call["index"] for call in calls] == [0, 1]
    assert [call["function"] for call in calls] == [{"name": "weather", "arguments": ARGUMENTS}] * 2
    assert choices[-1]["finish_reason"] == "tool_calls"
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)


@pytest.mark.parametrize("fields", [{"tools": None}, {"tool_choice": "none"}, {"response_format": {"type": "json_object"}}])
@pytest.mark.parametrize("stream", [False, True])
async def test_nobody_looks_for_calls_where_there_can_be_none(
    connect: Connect, fields: dict[str, object], stream: bool
) -> None:
    _, client = speaking(connect, CALL)
    response = await client.post(CHAT, json={**asked(stream=stream), **fields})
    if stream:
        text = "".join(event["choices"][0]["delta"].get("content", "") for event in events(response.text)[:-1])
        assert text == CALL
    else:
        choice = response.json()["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": CALL, "refusal": None}
        assert choice["finish_reason"] == "stop"


async def test_a_broken_call_stays_text_to_the_last_character(connect: Connect) -> None:
    broken = 'Well.\n<tool_call>\n{"name": "weather", "argu'
    _, client = speaking(connect, broken)
    choice = (await client.post(CHAT, json=asked())).json()["choices"][0]
    assert choice["message"]["content"] == broken
    assert choice["finish_reason"] == "stop"
    response = await client.post(CHAT, json=asked(stream=True))
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events(response.text)[:-1]) == broken


async def test_log_probabilities_come_with_what_was_withheld(connect: Connect) -> None:
    _, client = speaking(connect, CALL)
    whole = (await client.post(CHAT, json=asked(logprobs=True))).json()["choices"][0]
    streamed = events((await client.post(CHAT, json=asked(logprobs=True, stream=True))).text)[:-1]
    scored = [one for event in streamed for one in (event["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert scored == whole["logprobs"]["content"]
    assert len(scored) == len(CALL)


async def test_a_session_keeps_the_call_as_a_message_and_shows_it_as_the_model_wrote_it(connect: Connect) -> None:
    service, client = speaking(connect, f"Let me see.\n{CALL}")
    session = (await client.post("/v1/sessions", json={})).json()["id"]
    first = (await client.post(CHAT, json=asked(session_id=session))).json()["choices"][0]["message"]
    kept = (await client.get(f"/v1/sessions/{session}?messages=true")).json()["messages"][-1]
    assert kept == {"role": "assistant", "content": "Let me see.", "tool_calls": first["tool_calls"]}
    result = {"role": "tool", "tool_call_id": first["tool_calls"][0]["id"], "content": "rain"}
    await client.post(CHAT, json={"session_id": session, "messages": [result], "tools": TOOLS})
    prompts = [bytes(request.prompt).decode() for request in service.requests]
    assert prompts[1] == f"{prompts[0]}Let me see.\n{CALL}\n<|tool|>rain\n<|assistant|>"


async def test_turn_ahead_computes_the_call_as_the_next_turn_will_show_it(connect: Connect) -> None:
    service, client = speaking(connect, f"Let me see.\n{CALL}")
    await client.post(CHAT, json=asked())
    for _ in range(50):
        if service.anticipated:
            break
        await asyncio.sleep(0.01)
    prompt = bytes(service.requests[0].prompt).decode()
    assert bytes(service.anticipated[-1]).decode().startswith(f"{prompt}Let me see.\n{CALL}\n")


RESPONSES = "/v1/responses"
FLAT = [{"type": "function", **TOOLS[0]["function"]}]  # type: ignore[dict-item]


async def test_a_response_has_its_calls_as_items_and_goes_on_from_them(connect: Connect) -> None:
    service, client = speaking(connect, f"Let me see.\n{CALL}")
    first = (await client.post(RESPONSES, json={"input": "Hi", "tools": FLAT})).json()
    message, call = first["output"]
    assert message["content"][0]["text"] == "Let me see."
    assert (call["type"], call["name"], call["arguments"]) == ("function_call", "weather", ARGUMENTS)
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}
    await client.post(RESPONSES, json={"input": [result], "tools": FLAT, "previous_response_id": first["id"]})
    whole = [{"role": "user", "content": "Hi"}, message, call, result]
    await client.post(RESPONSES, json={"input": whole, "tools": FLAT})
    prompts = [bytes(request.prompt).decode() for request in service.requests]
    assert prompts[1] == f"{prompts[0]}Let me see.\n{CALL}\n<|tool|>rain\n<|assistant|>"
    assert prompts[2] == prompts[1], "a client that sends everything back means the same"


@pytest.mark.parametrize("text", ["Let me see.", ""])
async def test_the_clients_own_reader_of_streams_understands_calls(connect: Connect, text: str) -> None:
    _, client = speaking(connect, f"{text}{CALL}{CALL}")
    async with openai.AsyncOpenAI(base_url="http://pasture/v1", api_key="x", http_client=client, max_retries=0) as official:
        async with official.responses.stream(model="m", input="Hi", tools=FLAT) as stream:  # type: ignore[arg-type]
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
        assert final.output_text == text
        calls = [item for item in final.output if item.type == "function_call"]
        assert [json.loads(call.arguments) for call in calls] == [json.loads(ARGUMENTS)] * 2
        assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 2 + bool(text)
        assert final.id == (await official.responses.retrieve(final.id)).id


@pytest.fixture
async def bound() -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server that draws what its constraint leaves, with a model that calls as Hermes does."""
    async for client in serving(HERMES):
        yield client


async def serving(template: str) -> AsyncIterator[httpx.AsyncClient]:
    engine = FakeEngine(PoolShape(4096, 16))
    service = LocalService(engine, store_for(engine))
    transport = httpx.ASGITransport(create_app(service, ApiSettings(chat_template=template)), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://pasture") as client:
        yield client
    await asyncio.to_thread(service.close)


def check_weather(call: dict[str, Any]) -> None:
    arguments = json.loads(call["function"]["arguments"])
    assert call["function"]["name"] == "weather"
    assert arguments["city"] in ("Lima", "Oslo")
    assert 1 <= arguments["days"] <= 9


@pytest.mark.parametrize("template", [HERMES, LLAMA])
async def test_a_call_can_be_forced(template: str) -> None:
    async for client in serving(template):
        choice = {"type": "function", "function": {"name": "weather"}}
        answer = (await client.post(CHAT, json=asked(tool_choice=choice, n=3, seed=1))).json()
        for one in answer["choices"]:
            check_weather(one["message"]["tool_calls"][0])
            assert one["message"]["content"] is None
            assert one["finish_reason"] == "tool_calls"


async def test_any_call_can_be_forced(bound: httpx.AsyncClient) -> None:
    tools = [
        TOOLS[0],
        {**TOOLS[1], "function": {"name": "now", "parameters": {"type": "object", "additionalProperties": False}}},
    ]
    answer = (await bound.post(CHAT, json={**asked(tool_choice="required", n=12, seed=2), "tools": tools})).json()
    calls = [choice["message"]["tool_calls"] for choice in answer["choices"]]
    assert all(len(call) == 1 for call in calls)
    assert {call[0]["function"]["name"] for call in calls} == {"weather", "now"}


async def test_a_responses_call_can_be_forced(bound: httpx.AsyncClient) -> None:
    choice = {"type": "function", "name": "weather"}
    answer = (await bound.post(RESPONSES, json={"input": "Hi", "tools": FLAT, "tool_choice": choice})).json()
    (call,) = answer["output"]
    check_weather({"function": call})


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"tool_choice": "sometimes"}, "tool_choice can be"),
        ({"tool_choice": {"type": "function"}}, "tool_choice can be"),
        ({"tool_choice": {"type": "function", "function": {"name": "tides"}}}, "'tides'"),
        ({"tool_choice": "required", "tools": None}, "no tool to call"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "at once"),
    ],
)
async def test_a_choice_that_there_is_not_is_refused(bound: httpx.AsyncClient, fields: dict[str, object], told: str) -> None:
    response = await bound.post(CHAT, json={**asked(), **fields})
    assert response.status_code == 400
    assert error_of(response)["param"] == "tool_choice"
    assert told in error_of(response)["message"]


async def test_nothing_is_forced_from_a_model_that_cannot_call(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, json=asked(tool_choice="required"))
    assert error_of(response)["param"] == "tool_choice"
    assert "no form of calls" in error_of(response)["message"]


async def test_parameters_that_are_no_schema_are_the_tools_fault(bound: httpx.AsyncClient) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "colour"}}}]
    response = await bound.post(CHAT, json=chat_body(tools=tools, tool_choice="required"))
    assert response.status_code == 400
    assert error_of(response)["param"] == "tools"
