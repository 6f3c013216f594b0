"""Work that grows with a prompt's length, kept off the event loop, which carries everybody's streams.

Tokenising releases the interpreter lock, so a worker thread does it beside the loop. Short texts are not worth the hop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

INLINE_CHARACTERS = 16_384


async def off_loop(size: int, work: Callable[[], Result]) -> Result:
    """What `work` returns: made here if `size` (characters or tokens) is small, on a worker thread otherwise."""
    return work() if size <= INLINE_CHARACTERS else await asyncio.to_thread(work)
