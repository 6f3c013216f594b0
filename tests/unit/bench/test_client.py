from __future__ import annotations

import asyncio

import orjson
import pytest

from pasture.bench.client import Chat, Drawn, Endpoint, call_json, chat, read_stream
from tests.unit.bench.stub_openai import StubServer, response, serving

CHAT = Chat("Ada", ({"role": "user", "content": "one two three"},), max_tokens=3)
EVENTS = (
    {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"delta": {"content": "a"}}]},
    {"choices": [{"delta": {"content": "é"}}]},
    {"choices": [{"delta": {}, "finish_reason": "length"}]},
    {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 5}}},
)
STREAM = b"".join(b"data: " + orjson.dumps(event) + b"\n\n" for event in EVENTS) + b"data: [DONE]\n\n"


@pytest.mark.parametrize("size", [1, 2, 7, 64, 10_000])
def test_a_stream_reads_the_same_however_it_is_cut(size: int) -> None:
    pieces = [(float(start), STREAM[start : start + size]) for start in range(0, len(STREAM), size)]
    exchange = read_stream(CHAT, 0.0, 200, pieces)
    assert exchange.error is None
    assert exchange.reply == "aé"
    assert len(exchange.text_times) == 2
    assert (exchange.prompt_tokens, exchange.cached_tokens, exchange.completion_tokens) == (7, 5, 2)


def test_times_are_those_of_the_pieces_with_text() -> None:
    pieces = [
        (moment, b"data: " + orjson.dumps(event) + b"\n\n") for moment, event in zip((1.0, 2.0, 2.5), EVENTS, strict=False)
    ]
    exchange = read_stream(CHAT, 0.5, 200, pieces)
    assert exchange.ttft_seconds == 1.5
    assert exchange.gaps_seconds == [0.5]
    assert exchange.latency_seconds == 2.0


def test_errors_of_every_kind_are_told() -> None:
    assert "HTTP 429: full" in str(read_stream(CHAT, 0.0, 429, [(1.0, b"full")]).error)
    assert "boom" in str(read_stream(CHAT, 0.0, 200, [(1.0, b'data: {"error": {"message": "boom"}}\n\n')]).error)
    assert "without any text" in str(read_stream(CHAT, 0.0, 200, [(1.0, b"data: [DONE]\n\n")]).error)


def test_log_probabilities_are_read_where_they_are_told() -> None:
    told = {
        "content": [
            {"token": "a", "logprob": -0.5, "top_logprobs": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -2}]}
        ]
    }
    event = {"choices": [{"delta": {"content": "a"}, "logprobs": told}]}
    exchange = read_stream(CHAT, 0.0, 200, [(1.0, b"data: " + orjson.dumps(event) + b"\n\n")])
    assert exchange.drawn == (Drawn("a", -0.5, {"a": -0.5, "b": -2.0}),)


async def test_a_completion_over_a_socket() -> None:
    async with serving(StubServer()) as stub:
        exchange = await chat(stub.endpoint, CHAT, timeout_seconds=5)
    assert exchange.error is None
    assert exchange.reply == "reply-0 " * 3
    assert exchange.prompt_tokens == 3
    assert exchange.sent <= exchange.text_times[0] <= exchange.ended


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "closed the connection"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ndata:", "closed the connection"),
        (b"SMTP?\r\n\r\n", "not an HTTP response"),
        (response(503, {"error": "later"}), "HTTP 503"),
    ],
)
async def test_what_goes_wrong_on_the_wire_is_an_error_and_not_an_exception(raw: bytes, message: str) -> None:
    async with serving(StubServer(fail=lambda _: raw)) as stub:
        exchange = await chat(stub.endpoint, CHAT, timeout_seconds=5)
    assert message in str(exchange.error)


async def test_a_server_that_says_nothing_is_an_error_after_the_timeout() -> None:
    silent = asyncio.Event()

    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await silent.wait()
        writer.close()

    async with await asyncio.start_server(never, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        exchange = await chat(Endpoint("127.0.0.1", port), CHAT, timeout_seconds=0.05)
        silent.set()
    assert "no complete answer" in str(exchange.error)


async def test_nobody_there_is_an_error() -> None:
    exchange = await chat(Endpoint("127.0.0.1", 9), CHAT, timeout_seconds=5)
    assert exchange.error is not None


async def test_json_is_none_unless_the_answer_is_one() -> None:
    async with serving(StubServer(metrics="text")) as stub:
        assert await call_json(stub.endpoint, "/nowhere") is None
        assert await call_json(stub.endpoint, "/metrics") is None
        assert await call_json(stub.endpoint, "/health") == {"status": "ok"}


def test_urls_come_with_and_without_their_version() -> None:
    assert Endpoint.parse("http://box:8000/v1/") == Endpoint("box", 8000)
    assert Endpoint.parse("https://box/llm/v1", "key") == Endpoint("box", 443, True, "/llm", "key")
    assert Endpoint.parse("https://box/llm/v1").url == "https://box:443/llm"
