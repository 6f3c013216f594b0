"""An answer that is large enough to count: what it holds is let go once its client has it, not once the socket does.

A body that is handed over whole lies in memory until the client takes it, long after the route has ended. This one goes in
pieces, each when the one before it is gone.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

PIECE_BYTES = 256 << 10
PATIENCE_SECONDS = 30.0
SLOWEST_BYTES_PER_SECOND = 1 << 20
"""a client has the patience, and the time that the whole takes at this rate; then it is cut off"""


class HeldFile(Response):
    """Sends `data` and then closes `held`, also where the client leaves, or takes it too slowly."""

    def __init__(self, data: bytes, held: AsyncExitStack, media_type: str) -> None:
        super().__init__(media_type=media_type, headers={"content-length": str(len(data))})
        self._data = data
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            try:
                async with asyncio.timeout(PATIENCE_SECONDS + len(self._data) / SLOWEST_BYTES_PER_SECOND):
                    await self._send(send)
            except TimeoutError:  # an answer that is not complete ends its connection
                return
            finally:
                del self._data

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        data = memoryview(self._data)
        for start in range(0, len(data), PIECE_BYTES):
            await send({"type": "http.response.body", "body": data[start : start + PIECE_BYTES], "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
