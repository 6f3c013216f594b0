"""A job's answer over HTTP: whole, or as server-sent events.

Both watch for the client's departure and stop at once. A stream sends its status with its first token, so that an error
before it has a status of its own (429, 400, 503); a client that waits longer than a second gets the headers, and then a
comment every few seconds, so that proxies keep the connection. An error after that goes out as an `error` event, and the
stream ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from time import monotonic

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from pasture.api.disconnect import ClientGone, cancelled_after, cancelled_on_disconnect
from pasture.api.errors import problem
from pasture.api.fanout import interleave
from pasture.api.formats import Reply, Writer
from pasture.api.jobs import Choice, Job
from pasture.core.values import Finish
from pasture.text.replies import Fragment

OPENING_SECONDS = 1.0
COMMENT_SECONDS = 15.0
STUCK_SECONDS = 60.0
"""a client that takes nothing for so long is taken to be gone"""

Read = Callable[[Choice], AsyncGenerator[Fragment, None]]
"""starts a choice's request and yields the fragments of its reply"""

OnComplete = Callable[[Sequence[Reply]], Awaitable[None]]
"""what must be done before a client is told that its answer is complete"""

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


async def collect(job: Job, read: Read) -> list[Reply]:
    """Every choice's reply, complete. Raises what ends any of them early."""
    replies = [Reply(choice) for choice in job.choices]
    async with aclosing(interleave([read(choice) for choice in job.choices])) as fragments:
        async for index, fragment in fragments:
            replies[index].add(fragment)
    return replies


async def chunks(job: Job, read: Read, writer: Writer, on_complete: OnComplete | None = None) -> AsyncGenerator[bytes, None]:
    """The events of a stream, as bytes. `on_complete` gets the replies, before the stream ends."""
    replies = [Reply(choice) for choice in job.choices]
    opened: set[int] = set()
    finishes: dict[int, Finish] = {}
    async with aclosing(interleave([read(choice) for choice in job.choices])) as fragments:
        async for index, fragment in fragments:
            if on_complete is not None:
                replies[index].add(fragment)
            data = writer.next(index, fragment)
            if index not in opened:
                opened.add(index)
                data = writer.first(index) + data
            if fragment.finish is not None:
                finishes[index] = fragment.finish
            yield data
    if on_complete is not None:
        await on_complete(replies)
    yield writer.last(finishes)


class EventStream(Response):
    """Sends server-sent events as they come. Takes over `events` and closes it when the client leaves."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__()
        self._events = events
        self._started = False
        self._waiting_since: float | None = None
        """when the client was last offered something that it has not taken yet"""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with cancelled_on_disconnect(receive), cancelled_after(self._stuck), aclosing(self._events):
                await self._pump(self._timed(send))
        except ClientGone:
            return
        except Exception as error:
            trouble = problem(error)
            if not self._started:
                await trouble.response()(scope, receive, send)
                return
            await _body(send, b"data: " + trouble.body + b"\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _timed(self, send: Send) -> Send:
        async def timed(message: Message) -> None:
            self._waiting_since = monotonic()
            await send(message)
            self._waiting_since = None

        return timed

    async def _stuck(self) -> None:
        """Ends when the client has taken nothing for too long although something waits for it."""
        while True:
            since = self._waiting_since
            if since is not None and monotonic() - since >= STUCK_SECONDS:
                return
            await asyncio.sleep(STUCK_SECONDS / 4)

    async def _pump(self, send: Send) -> None:
        patience = asyncio.create_task(self._keep_open(send))
        try:
            first = await anext(self._events)
        finally:
            patience.cancel()
        await self._start(send)
        await _body(send, first)
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})

    async def _keep_open(self, send: Send) -> None:
        await asyncio.sleep(OPENING_SECONDS)
        await self._start(send)
        while True:
            await _body(send, b": waiting\n\n")
            await asyncio.sleep(COMMENT_SECONDS)

    async def _start(self, send: Send) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})


async def _body(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})
