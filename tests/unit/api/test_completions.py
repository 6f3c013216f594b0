from __future__ import annotations

import httpx
import pytest

from tests.unit.api.conftest import Connect
from tests.unit.api.wire import COMPLETIONS, error_of, events
from tests.unit.stub_service import BOS, StubService


async def test_an_answer_has_openais_shape(client: httpx.AsyncClient) -> None:
    body = (await client.post(COMPLETIONS, json={"prompt": "Once"})).json()
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "Hello there", "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"]["prompt_tokens"] == 4


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("ab", [b"ab"]),
        (["ab", "c"], [b"ab", b"c"]),
        ([97, 98], [b"ab"]),
        ([[97, 98], [99]], [b"ab", b"c"]),
        (["ab", [99]], [b"ab", b"c"]),
    ],
)
async def test_prompts_are_read_in_every_form(
    client: httpx.AsyncClient, service: StubService, prompt: object, prompts: list[bytes]
) -> None:
    body = (await client.post(COMPLETIONS, json={"prompt": prompt})).json()
    assert [bytes(request.prompt) for request in service.requests] == prompts
    assert [choice["index"] for choice in body["choices"]] == list(range(len(prompts)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, prompts))
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 3 * len(prompts)}


async def test_choices_of_several_prompts_stand_in_order(client: httpx.AsyncClient, service: StubService) -> None:
    body = (await client.post(COMPLETIONS, json={"prompt": ["a", "b"], "n": 2, "echo": True, "max_tokens": 1})).json()
    assert [choice["text"] for choice in body["choices"]] == ["aH", "aH", "bH", "bH"]
    assert body["usage"]["prompt_tokens"] == 2
    assert len(service.requests) == 4


async def test_echo_of_token_ids_is_their_text(client: httpx.AsyncClient) -> None:
    body = (await client.post(COMPLETIONS, json={"prompt": [BOS, 97], "echo": True, "max_tokens": 1})).json()
    assert body["choices"][0]["text"] == "<s>aH"


async def test_a_stream_begins_with_the_echo(client: httpx.AsyncClient) -> None:
    response = await client.post(COMPLETIONS, json={"prompt": "Once ", "echo": True, "stream": True, "max_tokens": 2})
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["Once ", "H", "e", ""]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_log_probabilities_in_the_completions_shape(client: httpx.AsyncClient) -> None:
    body = (await client.post(COMPLETIONS, json={"prompt": "x", "logprobs": 2, "max_tokens": 2})).json()
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["H", "e"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"H": -0.5, "G": -1.5}, {"e": -0.5, "d": -1.5}],
        "text_offset": [0, 1],
    }


async def test_no_prompt_gets_a_second_bos(connect: Connect) -> None:
    service = StubService()
    service.vocabulary.add_bos = True
    client = connect(service)
    await client.post(COMPLETIONS, json={"prompt": ["a", "<s>a"]})
    assert [request.prompt for request in service.requests] == [(BOS, 97), (BOS, 97)]


async def test_a_long_prompt_is_tokenised_all_the_same(client: httpx.AsyncClient, service: StubService) -> None:
    service.max_conversation_tokens = 100_000
    await client.post(COMPLETIONS, json={"prompt": "a" * 20_000})
    assert len(service.requests[0].prompt) == 20_000


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [100_000]}, "prompt"),
        ({"prompt": ["a"] * 3, "n": 100}, "n"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(client: httpx.AsyncClient, fields: dict[str, object], param: str) -> None:
    response = await client.post(COMPLETIONS, json={"prompt": "a", **fields})
    assert response.status_code == 400
    assert error_of(response)["param"] == param
