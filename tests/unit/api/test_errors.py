from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator

import httpx
import pytest

from pasture.api import ApiSettings, create_app
from pasture.api.errors import ANSWERS, problem
from pasture.core import errors
from pasture.core.errors import (
    ConfigError,
    DeadlineExceeded,
    EngineError,
    InvariantBroken,
    PastureError,
    PromptTooLong,
    QueueFull,
    RequestError,
    ShuttingDown,
)
from pasture.core.values import Finish, FinishReason, Request, TokenEvent, Usage
from tests.unit.api.conftest import Connect
from tests.unit.api.wire import CHAT, COMPLETIONS, chat_body, error_of, events
from tests.unit.stub_service import StubService

STATUSES = [
    (RequestError("bad", param="x"), 400),
    (PromptTooLong("long"), 400),
    (QueueFull("full", retry_after_seconds=2.2), 429),
    (DeadlineExceeded("late"), 408),
    (ShuttingDown("bye"), 503),
    (EngineError("broke"), 500),
    (InvariantBroken("bug"), 500),
    (ValueError("a bug of ours"), 500),
]


@pytest.mark.parametrize(("error", "status"), STATUSES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_an_error_before_the_first_token_has_its_status(
    connect: Connect, error: Exception, status: int, stream: bool, n: int
) -> None:
    service = StubService(error=error)
    response = await connect(service).post(CHAT, json=chat_body(stream=stream, n=n))
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    error_of(response)
    assert service.open == 0


async def test_a_full_queue_says_when_to_come_back(connect: Connect) -> None:
    response = await connect(StubService(error=QueueFull("full", retry_after_seconds=2.2))).post(CHAT, json=chat_body())
    assert response.headers["retry-after"] == "3"
    assert error_of(response) == {"message": "full", "type": "rate_limit_error", "param": None, "code": "queue_full"}


async def test_what_took_too_long_is_not_to_be_sent_again(connect: Connect) -> None:
    response = await connect(StubService(error=DeadlineExceeded("late"))).post(CHAT, json=chat_body())
    assert response.headers["x-should-retry"] == "false"


async def test_the_words_of_a_bug_are_not_shown(connect: Connect) -> None:
    response = await connect(StubService(error=ValueError("/secret/path"))).post(CHAT, json=chat_body())
    assert "secret" not in response.text
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("reason", "error", "kind"),
    [
        (FinishReason.ERROR, DeadlineExceeded("too late"), "timeout_error"),
        (FinishReason.CANCELLED, None, "unavailable_error"),
    ],
)
async def test_an_error_inside_a_stream_is_its_last_event(
    connect: Connect, reason: FinishReason, error: PastureError | None, kind: str
) -> None:
    async def script(request: Request) -> AsyncGenerator[TokenEvent, None]:
        yield TokenEvent(97)
        yield TokenEvent(None, finish=Finish(reason, Usage(1, 0, 1), error))

    client = connect(StubService(script=script))
    *_, token, last = events((await client.post(CHAT, json=chat_body(stream=True))).text)
    assert token["choices"][0]["delta"]["content"] == "a"
    assert last["error"]["type"] == kind
    whole = await client.post(CHAT, json=chat_body())
    assert whole.status_code in (408, 503)


def test_every_error_class_has_an_answer() -> None:
    for kind in vars(errors).values():
        if inspect.isclass(kind) and issubclass(kind, PastureError):
            assert any(parent in ANSWERS for parent in kind.__mro__)
    assert problem(errors.DoesNotFit("x")).status == 500


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", CHAT, 405), ("DELETE", "/health", 405), ("GET", "/v1/models/other", 404)],
)
async def test_what_the_framework_refuses_has_the_same_shape(
    client: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    response = await client.request(method, path)
    assert response.status_code == status
    error_of(response)
    assert status != 405 or response.headers["allow"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"messages": NaN}',
        b"\xff\xfe",
        b'{"messages": "\\ud800"}',
        b"[" * 100_000,
        b'{"messages": []}',
        b'{"messages": [1]}',
        b'{"messages": {}}',
        b"{}",
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize", "/apply-template"])
async def test_a_body_that_is_no_request_is_a_400(client: httpx.AsyncClient, path: str, body: bytes) -> None:
    response = await client.post(path, content=body)
    assert response.status_code == 400
    error_of(response)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": "inf"}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 2**40}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repeat_penalty": 0}, "repeat_penalty"),
        ({"mirostat": 3}, "mirostat"),
        ({"seed": "x"}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"stop": [1]}, "stop"),
        ({"stop": ["x"] * 33}, "stop"),
        ({"stop": "x" * 2000}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"٣": 1}}, "logit_bias"),
        ({"logit_bias": {"65": "x"}}, "logit_bias"),
        ({"logit_bias": {"1000": 1}}, "logit_bias"),
        ({"logit_bias": 5}, "logit_bias"),
        ({"logprobs": 5}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": "x"}}, "stream_options.include_usage"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": [1]}, "tools.0"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"grammar": 5}, "grammar"),
        ({"guided_grammar": "root ::= x"}, "guided_grammar"),
        ({"deadline_seconds": 0}, "deadline_seconds"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
    ],
)
async def test_what_is_wrong_is_refused_by_name(client: httpx.AsyncClient, fields: dict[str, object], param: str) -> None:
    response = await client.post(CHAT, json=chat_body(**fields))
    assert response.status_code == 400
    assert error_of(response)["param"] == param


@pytest.mark.parametrize(
    "fields", [{"response_format": {"type": "text"}}, {"functions": []}, {"stop": None}, {"logit_bias": None}, {"store": True}]
)
async def test_what_changes_nothing_is_let_through(client: httpx.AsyncClient, fields: dict[str, object]) -> None:
    assert (await client.post(CHAT, json=chat_body(**fields))).status_code == 200


async def test_a_body_over_the_limit_is_refused_whether_it_says_so_or_not(connect: Connect) -> None:
    client = connect(StubService(), ApiSettings(max_body_bytes=1000))

    async def endless() -> AsyncGenerator[bytes, None]:
        while True:
            yield b"x" * 300

    for content in (b"x" * 1001, endless()):
        response = await client.post(CHAT, content=content)
        assert response.status_code == 413
        assert response.headers["connection"] == "close"
        assert error_of(response)["code"] == "request_too_large"


def test_a_template_in_the_settings_that_does_not_compile_stops_the_start() -> None:
    with pytest.raises(ConfigError, match="not valid"):
        create_app(StubService(), ApiSettings(chat_template="{% if %}"))
