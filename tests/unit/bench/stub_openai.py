"""A server that speaks as much of OpenAI's protocol as the benchmark needs, in the test's own event loop, without a model.

Tokens are words; a reply is `reply-N` repeated; cached tokens are the longest prefix of any earlier prompt.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import orjson

from pasture.bench.client import Endpoint, Message


@dataclass
class StubServer:
    """What it was asked, and how it shall behave."""

    endpoint: Endpoint = field(default_factory=lambda: Endpoint("127.0.0.1", 0))
    prompts: list[list[Message]] = field(default_factory=list)
    metrics: str | None = None
    template_route: bool = True
    fail: Callable[[int], bytes | None] = lambda _: None
    """request number -> a whole raw response instead of a reply; `b""` closes the connection"""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split(" ")[1]
        lengths = [line.split(":")[1] for line in head.split("\r\n") if line.lower().startswith("content-length")]
        body = orjson.loads(await reader.readexactly(int(lengths[0]))) if lengths else {}
        if path == "/v1/chat/completions":
            await self._chat(body, writer)
        else:
            writer.write(self._plain(path, body))
        await writer.drain()
        writer.close()

    def _plain(self, path: str, body: dict[str, object]) -> bytes:
        if path == "/apply-template" and self.template_route:
            return response(200, {"prompt": " ".join(m["content"] for m in body["messages"])})  # type: ignore[attr-defined]
        if path == "/props":
            return response(200, {"chat_template": "{% for m in messages %}{{ m.content }} {% endfor %}"})
        if path == "/tokenize":
            return response(200, {"tokens": [hash(word) for word in str(body["content"]).split()]})
        if path == "/v1/models":
            return response(200, {"data": [{"id": "stub"}]})
        if path == "/health":
            return response(200, {"status": "ok"})
        if path == "/metrics" and self.metrics is not None:
            return response(200, self.metrics)
        return response(404, {"error": "no such thing"})

    async def _chat(self, body: dict[str, object], writer: asyncio.StreamWriter) -> None:
        messages: list[Message] = body["messages"]  # type: ignore[assignment]
        number = len(self.prompts)
        self.prompts.append(messages)
        failure = self.fail(number)
        if failure is not None:
            writer.write(failure)
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        events: list[object] = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
        events += [{"choices": [{"delta": {"content": f"reply-{number} "}}]} for _ in range(int(str(body["max_tokens"])))]
        words = sum(len(message["content"].split()) for message in messages)
        usage = {"prompt_tokens": words, "completion_tokens": body["max_tokens"], "prompt_tokens_details": {"cached_tokens": 1}}
        for event in [*events, {"choices": [], "usage": usage}]:
            data = b"data: " + orjson.dumps(event) + b"\n\n"
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))
            await writer.drain()
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


def response(status: int, value: object) -> bytes:
    data = value.encode() if isinstance(value, str) else orjson.dumps(value)
    return f"HTTP/1.1 {status} Some\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


@asynccontextmanager
async def serving(stub: StubServer) -> AsyncGenerator[StubServer]:
    server = await asyncio.start_server(stub.serve, "127.0.0.1", 0)
    async with server:
        stub.endpoint = Endpoint("127.0.0.1", server.sockets[0].getsockname()[1])
        yield stub
