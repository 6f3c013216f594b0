"""Pure ASGI middleware: request ids, the last resort for errors, API keys. None looks at a body, so a streamed token costs
nothing beyond the call."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pasture.api.errors import problem

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready"})
"""what a load balancer asks without a key"""

_USABLE_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestIds:
    """Echoes the client's X-Request-Id, or makes one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _USABLE_ID.fullmatch(given) else secrets.token_hex(16)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class LastResort:
    """Answers for what nothing inside it has answered for: a bug is a 500 in the usual shape, and in the log."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_and_note(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception as error:
            if started or scope["type"] != "http":
                raise
            await problem(error).response()(scope, receive, send)


class ApiKeys:
    """Lets through who presents one of the keys, and notes which one as `scope["pasture.key"]` (a digest)."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        presented = _presented(Headers(scope=scope))
        # every key is compared, so that the time says nothing about which one was close
        if sum(secrets.compare_digest(presented, key) for key in self._keys):
            scope["pasture.key"] = hashlib.sha256(presented).hexdigest()[:16]
            await self._app(scope, receive, send)
            return
        reason = "the API key is not valid" if presented else "an API key is needed: Authorization: Bearer KEY"
        refusal = HTTPException(401, reason, headers={"www-authenticate": "Bearer"})
        await problem(refusal).response()(scope, receive, send)


def _presented(headers: Headers) -> bytes:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    key = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    return key.encode("latin-1")
