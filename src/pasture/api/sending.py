"""An answer that is large enough to count: what it holds is let go once its client has it, not once the socket does.

A body that is handed over whole lies in memory until the client takes it, long after the route has ended. This one goes in
pieces, each when the one before it is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pasture.api.patience import patience

PIECE_BYTES = 256 << 10


class HeldFile(Response):
    """Sends `data` and then closes `held`, also where the client leaves, or takes it too slowly."""

    def __init__(self, data: bytes, held: AsyncExitStack, media_type: str) -> None:
        super().__init__(media_type=media_type, headers={"content-length": str(len(data))})
        self._data = data
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            try:
                async with patience(len(self._data)) as moved:
                    await self._send(send, moved)
            except TimeoutError:  # an answer that is not complete ends its connection
                return
            finally:
                del self._data

    async def _send(self, send: Send, moved: Callable[[int], None]) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        data = memoryview(self._data)
        for start in range(0, len(data), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            moved(len(piece))
        await send({"type": "http.response.body", "body": b"", "more_body": False})
