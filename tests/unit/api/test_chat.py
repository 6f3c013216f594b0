from __future__ import annotations

import math

import httpx
import pytest

from pasture.api import ApiSettings
from pasture.core.values import FinishReason, Kind, SamplingParams
from tests.unit.api.conftest import Connect
from tests.unit.api.wire import CHAT, chat_body, chat_texts, error_of, events
from tests.unit.stub_service import EOS, SPECIAL, StubService

PROMPT_TOKENS = 21  # "Hi" in the stub's chat template


async def test_an_answer_has_openais_shape(client: httpx.AsyncClient, service: StubService) -> None:
    response = await client.post(CHAT, json=chat_body())
    body = response.json()
    assert response.status_code == 200
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    assert body.pop("system_fingerprint").startswith("pasture-")
    assert body == {
        "object": "chat.completion",
        "model": "stub-model",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello there", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": 11,
            "total_tokens": PROMPT_TOKENS + 11,
            "prompt_tokens_details": {"cached_tokens": 3},
        },
    }
    assert service.open == 0


async def test_the_request_that_reaches_the_service(client: httpx.AsyncClient, service: StubService) -> None:
    await client.post(CHAT, json=chat_body(temperature=0, top_k=5, seed=7, logit_bias={"65": -100}, max_tokens=3, user="ann"))
    request = service.requests[0]
    assert request.prompt[-11:] == (SPECIAL["<|im_start|>"], *b"assistant\n")
    assert request.max_tokens == 3
    assert request.stop_tokens == service.vocabulary.end_tokens
    assert request.user == "ann"
    assert request.n_logprobs is None
    assert request.sampling == SamplingParams(temperature=0, top_k=5, seed=7, logit_bias={65: -100.0})


async def test_the_reply_may_be_as_long_as_fits(connect: Connect) -> None:
    service = StubService(max_conversation_tokens=PROMPT_TOKENS + 6)
    client = connect(service)
    for asked in ({}, {"max_tokens": 500}, {"max_completion_tokens": 500}, {"max_tokens": -1}):
        body = (await client.post(CHAT, json=chat_body(**asked))).json()
        assert body["choices"][0]["message"]["content"] == "Hello "
        assert body["choices"][0]["finish_reason"] == "length"
    assert {request.max_tokens for request in service.requests} == {6}


async def test_the_last_free_token_is_used(connect: Connect) -> None:
    body = (await connect(StubService(max_conversation_tokens=PROMPT_TOKENS + 1)).post(CHAT, json=chat_body())).json()
    assert body["choices"][0]["message"]["content"] == "H"


async def test_a_prompt_without_room_for_a_reply_is_refused(connect: Connect) -> None:
    response = await connect(StubService(max_conversation_tokens=PROMPT_TOKENS)).post(CHAT, json=chat_body())
    assert response.status_code == 400
    assert error_of(response)["code"] == "context_length_exceeded"


async def test_choices_share_a_prompt_and_differ_in_their_seeds(client: httpx.AsyncClient, service: StubService) -> None:
    body = (await client.post(CHAT, json=chat_body(n=3, seed=2**32 - 3))).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in body["choices"]} == {"Hello there"}
    assert body["usage"]["prompt_tokens"] == PROMPT_TOKENS
    assert body["usage"]["completion_tokens"] == 33
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    assert len({request.request_id for request in service.requests}) == 3
    assert len({request.prompt for request in service.requests}) == 1
    assert sorted(request.sampling.seed or 0 for request in service.requests) == [0, 2**32 - 3, 2**32 - 2]


async def test_a_seed_of_minus_one_is_no_seed(client: httpx.AsyncClient, service: StubService) -> None:
    await client.post(CHAT, json=chat_body(seed=-1))
    assert service.requests[0].sampling.seed is None


async def test_ignoring_the_end_bans_its_tokens(client: httpx.AsyncClient, service: StubService) -> None:
    await client.post(CHAT, json=chat_body(ignore_eos=True))
    assert service.requests[0].stop_tokens == frozenset()
    assert service.requests[0].sampling.logit_bias == {EOS: -math.inf, SPECIAL["<|im_end|>"]: -math.inf}


@pytest.mark.parametrize("bias", [{"65": -100, "66": 2.5}, [[65, -100], ["66", 2.5]]])
async def test_biases_are_read_in_both_spellings(client: httpx.AsyncClient, service: StubService, bias: object) -> None:
    await client.post(CHAT, json=chat_body(logit_bias=bias))
    assert service.requests[0].sampling.logit_bias == {65: -100.0, 66: 2.5}


async def test_a_bias_of_false_bans_the_token(client: httpx.AsyncClient, service: StubService) -> None:
    await client.post(CHAT, json=chat_body(logit_bias=[[65, False]]))
    assert service.requests[0].sampling.logit_bias == {65: -math.inf}


async def test_settings_give_the_defaults(connect: Connect) -> None:
    service = StubService()
    settings = ApiSettings(model_alias="herd", sampling=SamplingParams(temperature=0.1, seed=3), deadline_seconds=30)
    body = (await connect(service, settings).post(CHAT, json=chat_body(top_p=0.5))).json()
    assert body["model"] == "herd"
    assert service.requests[0].sampling == SamplingParams(temperature=0.1, top_p=0.5, seed=3)
    assert service.requests[0].deadline_seconds == 30


async def test_tools_reach_the_template_unless_the_choice_is_none(connect: Connect) -> None:
    service = StubService()
    client = connect(service, ApiSettings(chat_template="{% for t in tools or [] %}{{ t.function.name }}{% endfor %}."))
    tools = [{"type": "function", "function": {"name": "weather"}}]
    await client.post(CHAT, json=chat_body(tools=tools, tool_choice="auto"))
    await client.post(CHAT, json=chat_body(tools=tools, tool_choice="none"))
    assert [bytes(request.prompt) for request in service.requests] == [b"weather.", b"."]
    assert [request.expects for request in service.requests] == [Kind.TOOL, Kind.CHAT]


async def test_log_probabilities_in_the_chat_shape(client: httpx.AsyncClient) -> None:
    body = (await client.post(CHAT, json=chat_body(logprobs=True, top_logprobs=2, max_tokens=1))).json()
    top = [{"token": "H", "logprob": -0.5, "bytes": [72]}, {"token": "G", "logprob": -1.5, "bytes": [71]}]
    expected = {"content": [{**top[0], "top_logprobs": top}], "refusal": None}
    assert body["choices"][0]["logprobs"] == expected


async def test_stop_strings_end_the_reply_and_keep_the_usage(connect: Connect) -> None:
    service = StubService(reply="one. two. three")
    body = (await connect(service).post(CHAT, json=chat_body(stop=[" three", ". "]))).json()
    assert body["choices"][0]["message"]["content"] == "one"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 5
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    assert service.open == 0


async def test_the_pasture_object_comes_when_asked_for(client: httpx.AsyncClient) -> None:
    assert "pasture" not in (await client.post(CHAT, json=chat_body())).json()
    timing = (await client.post(CHAT, json=chat_body(pasture=True))).json()["pasture"]["choices"][0]
    assert timing["cached_tokens"] == 3
    assert set(timing) == {"cache", "index", "queue_seconds", "first_token_seconds", "total_seconds", "cached_tokens", "swaps"}
    streamed = await client.post(CHAT, json=chat_body(pasture=True, stream=True))
    assert events(streamed.text)[-2]["pasture"]["choices"] == [timing]


async def test_a_stream_has_openais_chunks(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, json=chat_body(stream=True, max_tokens=2))
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "H"},
        {"content": "e"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "length"]
    assert all("usage" not in chunk for chunk in chunks)


async def test_usage_comes_last_in_a_stream_that_asked_for_it(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, json=chat_body(stream=True, stream_options={"include_usage": True}))
    *chunks, usage, _ = events(response.text)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 11
    assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


async def test_streamed_choices_each_have_their_text_and_end(connect: Connect) -> None:
    service = StubService(reply='Grüße "🐑"\n')
    response = await connect(service).post(CHAT, json=chat_body(stream=True, n=4))
    assert chat_texts(response.text) == dict.fromkeys(range(4), 'Grüße "🐑"\n')
    ends = [c["index"] for e in events(response.text)[:-1] for c in e["choices"] if c["finish_reason"]]
    assert sorted(ends) == [0, 1, 2, 3]
    assert service.open == 0


async def test_streamed_log_probabilities(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, json=chat_body(stream=True, logprobs=True, max_tokens=2))
    scores = [event["choices"][0]["logprobs"] for event in events(response.text)[:-1]]
    assert scores[0] is None
    assert scores[1]["content"] == [{"token": "H", "logprob": -0.5, "bytes": [72], "top_logprobs": []}]
    assert scores[2]["content"][0]["token"] == "e"
    assert scores[3] is None


@pytest.mark.parametrize("stream", [False, True])
async def test_an_empty_reply_is_a_reply(connect: Connect, stream: bool) -> None:
    response = await connect(StubService(reply="")).post(CHAT, json=chat_body(stream=stream))
    if stream:
        assert chat_texts(response.text) == {0: ""}
        assert events(response.text)[0]["choices"][0]["delta"]["role"] == "assistant"
    else:
        assert response.json()["choices"][0]["message"]["content"] == ""
        assert response.json()["choices"][0]["finish_reason"] == FinishReason.STOP.value
