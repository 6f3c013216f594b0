"""Several replies at once, as one stream: the fragments of every choice in the order in which they come.

One choice is read directly. Several are read by a task each, through a bounded queue, so a client that reads slowly holds
them all back and none piles up in memory. Whatever ends the reading ends every choice.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from pasture.text.replies import Fragment

Fragments = AsyncGenerator[Fragment, None]


async def interleave(replies: Sequence[Fragments]) -> AsyncGenerator[tuple[int, Fragment], None]:
    """(index of the reply, fragment). Takes over the replies and closes them; the first one's error is everyone's."""
    if len(replies) == 1:
        async with aclosing(replies[0]) as reply:
            async for fragment in reply:
                yield 0, fragment
        return
    queue: asyncio.Queue[tuple[int, Fragment] | Exception | None] = asyncio.Queue(maxsize=2 * len(replies))
    tasks = [asyncio.create_task(_read(i, reply, queue)) for i, reply in enumerate(replies)]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _read(index: int, reply: Fragments, queue: asyncio.Queue[tuple[int, Fragment] | Exception | None]) -> None:
    async with aclosing(reply):
        try:
            async for fragment in reply:
                await queue.put((index, fragment))
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)
