"""The client went away: stop working for it at once.

An ASGI server says so through `receive()`. While a reply is made, one task waits there; when the news comes it cancels the
body of `cancelled_on_disconnect`, and with it whatever the body awaits, down to the service's generator.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from starlette.types import Receive


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


@asynccontextmanager
async def cancelled_on_disconnect(receive: Receive) -> AsyncIterator[None]:
    """Run the body until it ends or the client leaves; then it is cancelled and ClientGone raised in its place.

    The request's body must have been read. A cancellation from elsewhere passes through as usual.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async with cancelled_after(gone):
        yield


@asynccontextmanager
async def cancelled_after(news: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Run the body until it ends or `news` does; then it is cancelled and ClientGone raised in its place."""
    loop = asyncio.get_running_loop()
    scope = asyncio.timeout(None)

    async def watch() -> None:
        await news()
        # a timeout that is due now is the standard library's way to cancel a block, and not the whole task
        scope.reschedule(loop.time())

    try:
        async with scope:
            watcher = asyncio.create_task(watch())
            try:
                yield
            finally:
                watcher.cancel()
    except TimeoutError:
        if scope.expired():
            raise ClientGone from None
        raise
