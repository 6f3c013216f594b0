"""`/v1/sessions`: conversations that the server keeps, as things to hold. Everything is the tenant's whose key it is."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from functools import partial
from typing import Annotated

import orjson
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from pasture.api.answers import (
    CopiedSession,
    Deleted,
    ImportedSession,
    Prefetched,
    SessionBody,
    SessionList,
    SessionPage,
    SessionView,
)
from pasture.api.bodies import read_body, read_bytes
from pasture.api.callers import caller_of
from pasture.api.gateway import Gateway
from pasture.api.keepers import Keepers
from pasture.api.openapi import GENERATES, described
from pasture.api.sending import HeldFile
from pasture.api.session_schemas import ForkBody, NewSession, TargetBody, TruncateBody

MAX_PAGE = 1000
MAX_IMPORT_BYTES = 1 << 30

_TAG = "Sessions"
_FILE = "application/vnd.pasture.session"
_SENDS = (404, 409, 429, 502, 503)

_Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]


def session_routes(gateway: Gateway) -> APIRouter:
    """Routes over the gateway's sessions."""
    router = APIRouter(prefix="/v1/sessions")
    keepers = Keepers(gateway)
    _whole_routes(router, gateway, keepers)
    _branch_routes(router, gateway, keepers)
    _travel_routes(router, gateway, keepers)
    _cache_routes(router, gateway, keepers)
    return router


def _whole_routes(router: APIRouter, gateway: Gateway, keepers: Keepers) -> None:
    """Make, look, delete."""
    state, max_bytes = gateway.state, gateway.settings.max_body_bytes

    @router.post("", **described(_TAG, "A new session", SessionBody, body=NewSession, status=201, errors=(409, 429)))
    async def create(request: Request) -> Response:
        body = await read_body(request, NewSession, max_bytes)
        caller = caller_of(request, state)
        session = await asyncio.to_thread(
            lambda: state.sessions.create(
                caller.tenant, body.messages, name=body.name, context=body.context, metadata=body.metadata
            )
        )
        return _json(keepers.describe(caller.tenant, session), 201)

    @router.get("", **described(_TAG, "The tenant's sessions, by id", SessionPage))
    async def page(request: Request, limit: _Limit = 100, after: str | None = None) -> Response:
        caller = caller_of(request, state)
        found = await asyncio.to_thread(lambda: state.sessions.page(caller.tenant, limit=limit + 1, after=after))
        data = [keepers.describe(caller.tenant, session) for session in found[:limit]]
        return _json({"object": "list", "data": data, "has_more": len(found) > limit})

    @router.get("/{session_id}", **described(_TAG, "A session, where its KV is, and what was said", SessionView, errors=(404,)))
    async def show(session_id: str, request: Request, messages: bool = False) -> Response:
        shown, said = await keepers.show(caller_of(request, state), session_id)
        return _json(shown | {"messages": said} if messages else shown)

    @router.delete("/{session_id}", **described(_TAG, "Forget a session", Deleted, errors=(404,)))
    async def delete(session_id: str, request: Request) -> Response:
        await asyncio.to_thread(state.sessions.delete, caller_of(request, state).tenant, session_id)
        gateway.pinned.let_go(session_id)
        return _json({"id": session_id, "object": "session", "deleted": True})


def _branch_routes(router: APIRouter, gateway: Gateway, keepers: Keepers) -> None:
    """Sessions out of sessions."""
    state, limit = gateway.state, gateway.settings.max_body_bytes

    @router.post(
        "/{session_id}/fork",
        **described(
            _TAG,
            "Sessions with the same past, which share its cells until they differ",
            SessionList,
            body=ForkBody,
            status=201,
            errors=(404, 429),
        ),
    )
    async def fork(session_id: str, request: Request) -> Response:
        body = await read_body(request, ForkBody, limit)
        caller = caller_of(request, state)
        made = await asyncio.to_thread(state.sessions.fork, caller.tenant, session_id, body.n)
        return _json({"object": "list", "data": [keepers.describe(caller.tenant, session) for session in made]}, 201)

    @router.post(
        "/{session_id}/truncate", **described(_TAG, "Keep the first messages", SessionBody, body=TruncateBody, errors=(404,))
    )
    async def truncate(session_id: str, request: Request) -> Response:
        body = await read_body(request, TruncateBody, limit)
        caller = caller_of(request, state)
        session = await keepers.truncate(caller, session_id, body.messages, body.tokens)
        gateway.pinned.went_on(caller.tenant, session_id)
        return _json(keepers.describe(caller.tenant, session))


def _travel_routes(router: APIRouter, gateway: Gateway, keepers: Keepers) -> None:
    """Sessions that go elsewhere, or come from there."""
    state, limit = gateway.state, gateway.settings.max_body_bytes

    @router.post(
        "/import",
        **described(
            _TAG, "A session out of an exported file", ImportedSession, upload=_FILE, status=201, errors=(409, 413, 429, 503)
        ),
    )
    async def take_in(request: Request, adopt: bool = False) -> Response:
        caller = caller_of(request, state)
        session, n_tokens = await keepers.take_in(caller, partial(read_bytes, request, MAX_IMPORT_BYTES), adopt=adopt)
        return _json(keepers.describe(caller.tenant, session) | {"restored_tokens": n_tokens}, 201)

    @router.post(
        "/{session_id}/export",
        **described(_TAG, "A session as one file: what was said, its tokens, its KV", media=_FILE, errors=(404, 429, 503)),
    )
    async def export(session_id: str, request: Request, blocks: bool = True) -> Response:
        async with AsyncExitStack() as held:
            data = await held.enter_async_context(keepers.export(caller_of(request, state), session_id, blocks=blocks))
            return HeldFile(data, held.pop_all(), _FILE)

    @router.post(
        "/{session_id}/copy",
        **described(
            _TAG,
            "The session as another tenant's, here or on another server; the copy shares nothing with this one",
            CopiedSession,
            body=TargetBody,
            status=201,
            errors=_SENDS,
        ),
    )
    async def copy(session_id: str, request: Request) -> Response:
        body = await read_body(request, TargetBody, limit)
        return _json(await keepers.copy(caller_of(request, state), session_id, body), 201)

    @router.post(
        "/{session_id}/move",
        **described(_TAG, "The same, and it is gone from here", CopiedSession, body=TargetBody, status=201, errors=_SENDS),
    )
    async def move(session_id: str, request: Request) -> Response:
        body = await read_body(request, TargetBody, limit)
        caller = caller_of(request, state)
        if body.replica is not None:
            return _json(await keepers.carry(caller, session_id, body.replica), 201)
        return _json(await keepers.move(caller, session_id, body), 201)


def _cache_routes(router: APIRouter, gateway: Gateway, keepers: Keepers) -> None:
    """What happens to a session's KV."""
    state = gateway.state

    @router.post(
        "/{session_id}/pin",
        **described(
            _TAG,
            "A pinned session does not expire, and what there is of its KV stays in RAM",
            SessionBody,
            errors=(404, 429, 503),
        ),
    )
    async def pin(session_id: str, request: Request) -> Response:
        caller = caller_of(request, state)
        return _json(keepers.describe(caller.tenant, await gateway.pinned.pin(caller.tenant, session_id)))

    @router.post("/{session_id}/unpin", **described(_TAG, "The session may expire again", SessionBody, errors=(404,)))
    async def unpin(session_id: str, request: Request) -> Response:
        caller = caller_of(request, state)
        return _json(keepers.describe(caller.tenant, await gateway.pinned.unpin(caller.tenant, session_id)))

    @router.post(
        "/{session_id}/prefetch",
        **described(
            _TAG,
            "Bring a session's KV into the live cache, or only into RAM, before anybody asks",
            Prefetched,
            errors=(400, 404, *GENERATES),
        ),
    )
    async def prefetch(session_id: str, request: Request, live: bool = True) -> Response:
        return _json(await keepers.prefetch(caller_of(request, state), session_id, live=live))


def _json(value: object, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")
