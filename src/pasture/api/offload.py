"""Work that grows with a text's length, kept off the event loop, which carries everybody's streams.

Tokenising releases the interpreter lock, so a worker thread does it beside the loop. Short texts are not worth the hop. These
threads do nothing else, so that a few enormous prompts hold up other enormous prompts, and no session and no login.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")

INLINE_CHARACTERS = 16_384
N_WORKERS = 2

_workers = ThreadPoolExecutor(N_WORKERS, "pasture-text")


async def off_loop(size: int, work: Callable[[], Result], *, small: int = INLINE_CHARACTERS) -> Result:
    """What `work` returns: made here if `size` (characters or tokens) is `small` at most, on a worker thread otherwise."""
    if size <= small:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_workers, work)


def size_of(*values: object) -> int:
    """About how many characters of text JSON values hold; containers count as well, so that many small things are many."""
    size, left = 0, list(values)
    while left:
        value = left.pop()
        size += len(value) if isinstance(value, str) else 1
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value
    return size
