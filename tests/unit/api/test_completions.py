from __future__ import annotations

import threading

import httpx
import pytest

from pasture.api.schemas import MAX_REQUESTS
from tests.unit.api.conftest import Connect
from tests.unit.api.wire import CHAT, COMPLETIONS, error_of, events
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


async def test_more_prompts_than_one_call_may_have_are_refused_before_any_is_read(client: httpx.AsyncClient) -> None:
    for prompts, n in ((["a"] * (MAX_REQUESTS + 1), 1), (["a"] * (MAX_REQUESTS // 2), 3)):
        answer = await client.post(COMPLETIONS, json={"prompt": prompts, "n": n})
        assert answer.status_code == 400
        assert str(MAX_REQUESTS) in error_of(answer)["message"]


async def test_long_texts_are_read_beside_the_loop(service: StubService, client: httpx.AsyncClient) -> None:
    here, where = threading.get_ident(), set[int]()
    tokenize = service.vocabulary.tokenize

    def noting(text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        where.add(threading.get_ident())
        return tokenize(text, add_special=add_special, parse_special=parse_special)

    service.vocabulary.tokenize = noting  # type: ignore[method-assign]
    long = "word " * 4000
    await client.post(COMPLETIONS, json={"prompt": [long[: len(long) // 100]] * 100})
    await client.post("/tokenize", json={"content": long, "with_pieces": True})
    await client.post(CHAT, json={"messages": [{"role": "user", "content": long}]})
    assert where
    assert here not in where
    await client.post("/tokenize", json={"content": "word"})
    assert here in where
