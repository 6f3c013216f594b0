"""A load generator's HTTP client: one request a connection, a time stamp a chunk, next to no CPU.

It shares the cores with the system it measures, so while a stream runs it only notes when bytes came; server-sent events are
taken apart after the stream ended. Parsing of HTTP is `httptools`' (C). Knows the OpenAI wire format, nothing of workloads.
Runs on the event loop of the caller; cancelling a call closes its connection, which is how a user who leaves looks to a
server.
"""

from __future__ import annotations

import asyncio
import signal
import ssl
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import httptools
import orjson

_T = TypeVar("_T")
Json = Mapping[str, object]
Message = dict[str, str]
"""`role` and `content`"""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an OpenAI-compatible server answers."""

    host: str
    port: int
    secure: bool = False
    prefix: str = ""
    """path before `/v1`"""
    api_key: str | None = None

    @classmethod
    def parse(cls, url: str, api_key: str | None = None) -> Endpoint:
        """From a URL with or without a trailing `/v1`."""
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname or "127.0.0.1", parts.port or (443 if secure else 80), secure, prefix, api_key)

    @property
    def url(self) -> str:
        return f"{'https' if self.secure else 'http'}://{self.host}:{self.port}{self.prefix}"


@dataclass(frozen=True, slots=True)
class Chat:
    """One request for a chat completion, always greedy and of exactly `max_tokens` tokens."""

    user: str
    messages: tuple[Message, ...]
    max_tokens: int
    model: str = "default"
    top_logprobs: int = 0
    """of the likeliest tokens, how many to tell with each that is drawn"""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token of a reply, with natural log probabilities."""

    token: str
    logprob: float
    top: Mapping[str, float]
    """the likeliest tokens at its place"""

    def lead(self, token: str) -> float:
        """By how many nats it is ahead of another; of one that is not told, ahead of the least likely that is."""
        return self.logprob - self.top.get(token, min(self.top.values(), default=self.logprob))


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request and its reply as the client saw them. Times are of `time.perf_counter`."""

    chat: Chat
    sent: float
    ended: float
    text_times: tuple[float, ...]
    """when each chunk with text came"""
    reply: str
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None
    drawn: tuple[Drawn, ...] = ()
    """its tokens, where the request asked for log probabilities"""

    @property
    def ttft_seconds(self) -> float:
        """Until the first text. Only for exchanges without an error."""
        return self.text_times[0] - self.sent

    @property
    def latency_seconds(self) -> float:
        return self.ended - self.sent

    @property
    def gaps_seconds(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.text_times, self.text_times[1:], strict=False)]


@dataclass(slots=True)
class _Answer:
    status: int = 0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(piece for _, piece in self.pieces)


class _Reader(asyncio.Protocol):
    """Collects one response; `done` is resolved when it is complete or the connection ended."""

    def __init__(self, request: bytes) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.answer = _Answer()
        self._request = request
        self._parser = httptools.HttpResponseParser(self)
        self._now = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._finish(ConnectionError(f"not an HTTP response: {error}"))

    def on_body(self, body: bytes) -> None:
        self.answer.pieces.append((self._now, body))

    def on_message_complete(self) -> None:
        self.answer.status = self._parser.get_status_code()
        self._finish(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish(exc or ConnectionError("the server closed the connection in the middle of its answer"))

    def _finish(self, error: Exception | None) -> None:
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


async def call(endpoint: Endpoint, path: str, body: Json | None = None, *, timeout_seconds: float = 30.0) -> tuple[int, bytes]:
    """Status and body of a GET, or of a POST where there is a body. Raises OSError when no complete answer comes."""
    answer = await _exchange(endpoint, path, body, timeout_seconds)
    return answer.status, answer.body


async def call_json(endpoint: Endpoint, path: str, body: Json | None = None, *, timeout_seconds: float = 30.0) -> Json | None:
    """The JSON object at a path; None unless the server answers 200 with one."""
    status, data = await call(endpoint, path, body, timeout_seconds=timeout_seconds)
    if status != 200:
        return None
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


async def chat(endpoint: Endpoint, request: Chat, *, timeout_seconds: float) -> Exchange:
    """Stream one completion. Failures of every kind are in `Exchange.error`; only cancellation is raised."""
    body = {
        "model": request.model,
        "messages": request.messages,
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "seed": 1,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "user": request.user,
    }
    if request.top_logprobs:
        body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    sent = time.perf_counter()
    try:
        answer = await _exchange(endpoint, "/v1/chat/completions", body, timeout_seconds)
    except TimeoutError:
        return Exchange(request, sent, time.perf_counter(), (), "", error=f"no complete answer in {timeout_seconds:g} s")
    except OSError as error:
        return Exchange(request, sent, time.perf_counter(), (), "", error=str(error) or type(error).__name__)
    return read_stream(request, sent, answer.status, answer.pieces)


async def _exchange(endpoint: Endpoint, path: str, body: Json | None, timeout_seconds: float) -> _Answer:
    payload = b"" if body is None else orjson.dumps(body)
    head = [
        f"{'GET' if body is None else 'POST'} {endpoint.prefix}{path} HTTP/1.1",
        f"Host: {endpoint.host}:{endpoint.port}",
        "Connection: close",
    ]
    if body is not None:
        head += ["Content-Type: application/json", f"Content-Length: {len(payload)}"]
    if endpoint.api_key is not None:
        head.append(f"Authorization: Bearer {endpoint.api_key}")
    request = "\r\n".join([*head, "", ""]).encode() + payload
    context = ssl.create_default_context() if endpoint.secure else None
    async with asyncio.timeout(timeout_seconds):
        transport, reader = await asyncio.get_running_loop().create_connection(
            lambda: _Reader(request), endpoint.host, endpoint.port, ssl=context
        )
        try:
            await reader.done
        finally:
            transport.close()
    return reader.answer


def read_stream(request: Chat, sent: float, status: int, pieces: Sequence[tuple[float, bytes]]) -> Exchange:
    """An exchange from the bytes of a response and the times they came at."""
    ended = pieces[-1][0] if pieces else time.perf_counter()
    if status != 200:
        body = b"".join(piece for _, piece in pieces).decode(errors="replace")
        return Exchange(request, sent, ended, (), "", error=f"HTTP {status}: {body[:300]}")
    reply: list[str] = []
    times: list[float] = []
    drawn: list[Drawn] = []
    usage: Json = {}
    error: str | None = None
    for moment, event in _events(pieces):
        if "error" in event:
            error = orjson.dumps(event["error"]).decode()[:300]
        usage = cast(Json, event.get("usage") or usage)
        for choice in cast(Sequence[Json], event.get("choices") or ()):
            text = cast(Json, choice.get("delta") or {}).get("content")
            if isinstance(text, str) and text:
                reply.append(text)
                times.append(moment)
            drawn += _drawn(choice)
    if error is None and not times:
        error = "the stream ended without any text"
    details = cast(Json, usage.get("prompt_tokens_details") or {})
    return Exchange(
        request,
        sent,
        ended,
        tuple(times),
        "".join(reply),
        prompt_tokens=_count(usage, "prompt_tokens"),
        cached_tokens=_count(details, "cached_tokens"),
        completion_tokens=_count(usage, "completion_tokens"),
        error=error,
        drawn=tuple(drawn),
    )


def _drawn(choice: Json) -> Iterator[Drawn]:
    told = cast(Json, choice.get("logprobs") or {}).get("content")
    for entry in cast(Sequence[Mapping[str, Any]], told or ()):
        top = {str(each["token"]): float(each["logprob"]) for each in entry["top_logprobs"]}
        yield Drawn(str(entry["token"]), float(entry["logprob"]), top)


def _events(pieces: Sequence[tuple[float, bytes]]) -> list[tuple[float, Json]]:
    events: list[tuple[float, Json]] = []
    rest = b""
    for moment, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if line.startswith(b"data:") and data != b"[DONE]":
                event = orjson.loads(data)
                if isinstance(event, dict):
                    events.append((moment, event))
    return events


def _count(values: Json, name: str) -> int | None:
    value = values.get(name)
    return value if isinstance(value, int) else None


def run_loop(main: Coroutine[object, object, _T]) -> _T:
    """Run a coroutine to its end, on uvloop where it exists. SIGINT and SIGTERM cancel it, so that its `finally` blocks run.

    Raises KeyboardInterrupt or asyncio.CancelledError then.
    """
    try:
        import uvloop
    except ImportError:
        return asyncio.run(_ended_by_sigterm(main))
    return uvloop.run(_ended_by_sigterm(main))


async def _ended_by_sigterm(main: Coroutine[object, object, _T]) -> _T:
    task = asyncio.current_task()
    if task is not None:
        with suppress(NotImplementedError, RuntimeError, ValueError):  # not the main thread, or no such signal here
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await main
