"""uvicorn's HTTP protocol with a bound on what a request may be before its body begins.

Request line and headers are collected in memory while they come, and nothing else says how much that may be. Whoever sends more
gets a 431, and the connection ends.
"""

from __future__ import annotations

from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10

_MESSAGE = f"the request's line and headers are longer than {MAX_HEAD_BYTES} bytes"
_BODY = orjson.dumps({"error": {"message": _MESSAGE, "type": "invalid_request_error", "param": None, "code": "head_too_large"}})
_ANSWER = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(_BODY), _BODY)
)


class BoundedHeads(HttpToolsProtocol):
    """Counts what comes until a head is complete."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = False
        self._head_bytes = 0

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.transport.write(_ANSWER)
                self.transport.close()
