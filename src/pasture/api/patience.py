"""How long a client may take for many bytes, be it that it sends them or that it is sent them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

PATIENCE_SECONDS = 30.0
SLOWEST_BYTES_PER_SECOND = 1 << 20
"""a client has the patience, and the time that all of it takes at this rate"""
TRICKLE_BYTES_PER_SECOND = 1 << 18
"""and at no time more than the patience, and the time that what has been moved by then takes at this one"""


@asynccontextmanager
async def patience(max_bytes: int) -> AsyncIterator[Callable[[int], None]]:
    """Move at most so many bytes within the block, which says of each piece how many they were.

    Raises TimeoutError when that takes too long.
    """
    first = asyncio.get_running_loop().time() + PATIENCE_SECONDS
    last = first + max_bytes / SLOWEST_BYTES_PER_SECOND
    n_moved = 0
    async with asyncio.timeout_at(first) as timeout:

        def moved(n_bytes: int) -> None:
            nonlocal n_moved
            n_moved += n_bytes
            timeout.reschedule(min(last, first + n_moved / TRICKLE_BYTES_PER_SECOND))

        yield moved
