"""Pure ASGI middleware: request ids, the last resort for errors, API keys. None looks at a body, so a streamed token costs
nothing beyond the call."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pasture.api.callers import ADMIN, KEY, TENANT
from pasture.api.errors import problem
from pasture.core.context import REQUEST_ID, TRACE_PARENT
from pasture.sessions.tenants import Keyring

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/", "/chat"})
"""what a load balancer asks without a key; and the pages, which hold no data and ask for a key themselves"""
OPEN_PREFIX = "/web/"
"""the files of the pages"""

ADMIN_PATHS = frozenset({"/metrics", "/slots", "/v1/diagnosis", "/v1/live", "/v1/live/now"})
"""what tells of everybody's doing: the admin key's, where there is one"""
ADMIN_PREFIX = "/v1/admin/"
"""the admin key's alone; without one, these routes do not exist"""
PROPS = "/props"
"""an ordinary key's and the admin key's; where there is an admin key, it alone sees what tells of everybody's doing"""

UNLOGGED_PATHS = OPEN_PATHS | {"/metrics", "/v1/live/now"}
"""asked every few seconds by machines"""

_requests = logging.getLogger("pasture.requests")
_USABLE_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestIds:
    """Echoes the client's X-Request-Id, or makes one; whatever is logged or traced meanwhile belongs to it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _USABLE_ID.fullmatch(given) else secrets.token_hex(16)
        REQUEST_ID.set(request_id)
        TRACE_PARENT.set(headers.get("traceparent"))
        started, status = time.monotonic(), None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            if scope["path"] not in UNLOGGED_PATHS:
                seconds = round(time.monotonic() - started, 4)
                about = {"method": scope["method"], "path": scope["path"], "status": status, "seconds": seconds}
                _requests.info("answered", extra=about)


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


class AdminPort:
    """Two ports, one app: what tells of everybody's doing on the one, everything else on the other, and on both what is open.

    A request's port is the one that its connection came in by; nothing in the request can say otherwise.
    """

    def __init__(self, app: ASGIApp, port: int) -> None:
        self._app = app
        self._port = port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_open(scope["path"]):
            came_in = scope["server"][1] if scope.get("server") else None
            if is_admins(scope["path"]) != (came_in == self._port):
                await problem(HTTPException(404, "Not Found")).response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


class ApiKeys:
    """Lets through who presents a valid key, and notes in the scope whose it is. A server without keys lets everybody through.

    With an admin key, the routes that look at everybody's doing open to that key alone. `/props` opens to both kinds, and the
    scope says when it was the admin key.
    """

    def __init__(self, app: ASGIApp, keyring: Keyring, admin_key: str | None = None) -> None:
        self._app = app
        self._keyring = keyring
        self._admin_key = None if admin_key is None else admin_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_open(scope["path"]):
            presented = _presented(Headers(scope=scope))
            refusal = self._refused(presented) if self._wants_admin(scope["path"]) else await self._unknown(scope, presented)
            if refusal is not None:
                await problem(refusal).response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _wants_admin(self, path: str) -> bool:
        return path.startswith(ADMIN_PREFIX) or (self._admin_key is not None and is_admins(path))

    def _refused(self, presented: bytes) -> Exception | None:
        if self._admin_key is None:
            return HTTPException(404, "Not Found")
        return None if self._is_admins(presented) else _needs_key(presented, "the admin key")

    def _is_admins(self, presented: bytes) -> bool:
        return self._admin_key is not None and secrets.compare_digest(presented, self._admin_key)

    async def _unknown(self, scope: Scope, presented: bytes) -> Exception | None:
        """Why the request is not let in; None where it is, and then the scope says whose it is."""
        if scope["path"] == PROPS and self._is_admins(presented):
            scope[ADMIN] = True
            return None
        closed = self._keyring.known_closed()
        if not (await asyncio.to_thread(self._keyring.closed) if closed is None else closed):
            return None
        tenant = None
        if presented:
            tenant = self._keyring.remembered(presented) or await asyncio.to_thread(self._keyring.find, presented)
        if tenant is None:
            return _needs_key(presented, "an API key")
        scope[TENANT] = tenant
        scope[KEY] = hashlib.sha256(presented).hexdigest()[:16]
        return None


def is_open(path: str) -> bool:
    """Whether a path needs no key."""
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIX)


def is_admins(path: str) -> bool:
    """Whether a path tells of everybody's doing."""
    return path.startswith(ADMIN_PREFIX) or path in ADMIN_PATHS


def _needs_key(presented: bytes, what: str) -> HTTPException:
    reason = "the API key is not valid" if presented else f"{what} is needed: Authorization: Bearer KEY"
    return HTTPException(401, reason, headers={"www-authenticate": "Bearer"})


def _presented(headers: Headers) -> bytes:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    key = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    return key.encode("latin-1")
