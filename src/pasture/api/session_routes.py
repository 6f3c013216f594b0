"""`/v1/sessions`: conversations that the server keeps, as things to hold. Everything is the tenant's whose key it is."""

from __future__ import annotations

import asyncio

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from pasture.api.bodies import read_body, read_bytes
from pasture.api.callers import caller_of
from pasture.api.gateway import Gateway
from pasture.api.keepers import Keepers
from pasture.api.session_schemas import ForkBody, NewSession, TargetBody, TruncateBody
from pasture.core.errors import RequestError

MAX_PAGE = 1000
MAX_IMPORT_BYTES = 1 << 30

_YES, _NO = frozenset({"1", "true", "yes"}), frozenset({"", "0", "false", "no"})


def session_routes(gateway: Gateway) -> APIRouter:
    """Routes over the gateway's sessions."""
    router = APIRouter(prefix="/v1/sessions")
    keepers = Keepers(gateway)
    _whole_routes(router, gateway, keepers)
    _branch_routes(router, gateway, keepers)
    _cache_routes(router, gateway, keepers)
    return router


def _whole_routes(router: APIRouter, gateway: Gateway, keepers: Keepers) -> None:
    """Make, look, delete."""
    state, limit = gateway.state, gateway.settings.max_body_bytes

    @router.post("")
    async def create(request: Request) -> Response:
        body = await read_body(request, NewSession, limit)
        caller = caller_of(request, state)
        session = await asyncio.to_thread(
            lambda: state.sessions.create(
                caller.tenant, body.messages, name=body.name, context=body.context, metadata=body.metadata
            )
        )
        return _json(keepers.describe(caller.tenant, session), 201)

    @router.get("")
    async def page(request: Request) -> Response:
        caller = caller_of(request, state)
        n = _number(request, "limit", 100, MAX_PAGE)
        after = request.query_params.get("after")
        found = await asyncio.to_thread(lambda: state.sessions.page(caller.tenant, limit=n + 1, after=after))
        data = [keepers.describe(caller.tenant, session) for session in found[:n]]
        return _json({"object": "list", "data": data, "has_more": len(found) > n})

    @router.get("/{session_id}")
    async def show(session_id: str, request: Request) -> Response:
        shown, messages = await keepers.show(caller_of(request, state), session_id)
        return _json(shown | {"messages": messages} if _flag(request, "messages") else shown)

    @router.delete("/{session_id}")
    async def delete(session_id: str, request: Request) -> Response:
        await asyncio.to_thread(state.sessions.delete, caller_of(request, state).tenant, session_id)
        keepers.let_go(session_id)
        return _json({"id": session_id, "object": "session", "deleted": True})


def _branch_routes(router: APIRouter, gateway: Gateway, keepers: Keepers) -> None:
    """Sessions out of sessions."""
    state, limit = gateway.state, gateway.settings.max_body_bytes

    @router.post("/import")
    async def take_in(request: Request) -> Response:
        caller = caller_of(request, state)
        data = await read_bytes(request, MAX_IMPORT_BYTES)
        session, n_tokens = await keepers.take_in(caller, data, adopt=_flag(request, "adopt"))
        return _json(keepers.describe(caller.tenant, session) | {"restored_tokens": n_tokens}, 201)

    @router.post("/{session_id}/export")
    async def export(session_id: str, request: Request) -> Response:
        data = await keepers.export(caller_of(request, state), session_id, blocks=_flag(request, "blocks", usual=True))
        return Response(data, media_type="application/vnd.pasture.session")

    @router.post("/{session_id}/fork")
    async def fork(session_id: str, request: Request) -> Response:
        body = await read_body(request, ForkBody, limit)
        caller = caller_of(request, state)
        made = await asyncio.to_thread(state.sessions.fork, caller.tenant, session_id, body.n)
        return _json({"object": "list", "data": [keepers.describe(caller.tenant, session) for session in made]}, 201)

    @router.post("/{session_id}/copy")
    async def copy(session_id: str, request: Request) -> Response:
        body = await read_body(request, TargetBody, limit)
        caller, target = caller_of(request, state), await keepers.target(body.target_key)
        made = await asyncio.to_thread(state.sessions.copy, caller.tenant, session_id, target)
        return _json(keepers.describe(target, made), 201)

    @router.post("/{session_id}/move")
    async def move(session_id: str, request: Request) -> Response:
        body = await read_body(request, TargetBody, limit)
        caller, target = caller_of(request, state), await keepers.target(body.target_key)
        made = await asyncio.to_thread(state.sessions.move, caller.tenant, session_id, target)
        keepers.let_go(session_id)
        return _json(keepers.describe(target, made), 201)

    @router.post("/{session_id}/truncate")
    async def truncate(session_id: str, request: Request) -> Response:
        body = await read_body(request, TruncateBody, limit)
        caller = caller_of(request, state)
        session = await keepers.truncate(caller, session_id, body.messages, body.tokens)
        return _json(keepers.describe(caller.tenant, session))


def _cache_routes(router: APIRouter, gateway: Gateway, keepers: Keepers) -> None:
    """What happens to a session's KV."""
    state = gateway.state

    @router.post("/{session_id}/pin")
    async def pin(session_id: str, request: Request) -> Response:
        caller = caller_of(request, state)
        return _json(keepers.describe(caller.tenant, await keepers.pin(caller, session_id)))

    @router.post("/{session_id}/unpin")
    async def unpin(session_id: str, request: Request) -> Response:
        caller = caller_of(request, state)
        return _json(keepers.describe(caller.tenant, await keepers.unpin(caller, session_id)))

    @router.post("/{session_id}/prefetch")
    async def prefetch(session_id: str, request: Request) -> Response:
        return _json(await keepers.prefetch(caller_of(request, state), session_id))


def _json(value: object, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


def _flag(request: Request, name: str, *, usual: bool = False) -> bool:
    value = request.query_params.get(name)
    if value is None:
        return usual
    if value.lower() not in _YES | _NO:
        raise RequestError(f"{name} is true or false", param=name)
    return value.lower() in _YES


def _number(request: Request, name: str, usual: int, most: int) -> int:
    value = request.query_params.get(name, str(usual))
    if not (value.isascii() and value.isdecimal() and len(value) < 10 and 1 <= int(value) <= most):
        raise RequestError(f"{name} is a number from 1 to {most}", param=name)
    return int(value)
