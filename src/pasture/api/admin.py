"""The operator's routes, open to the admin key alone: tenants, their limits, everybody's sessions, and public prefixes."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated

import orjson
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from pasture.api.answers import PublicPrefixBody, PublicPrefixGone, PublicPrefixList, SessionOverview, TenantBody, TenantList
from pasture.api.bodies import read_body
from pasture.api.gateway import Gateway
from pasture.api.openapi import described
from pasture.api.overview import MAX_PAGE, overview
from pasture.sessions.values import Tenant

MAX_OFFSET = 1_000_000
_Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]
_Offset = Annotated[int, Query(ge=0, le=MAX_OFFSET)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class LimitsBody(_Body):
    """Limits to change; those that are not named stay."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    max_concurrent: Annotated[int, Field(ge=1)] | None = None
    max_priority: Annotated[int, Field(ge=-1, le=1)] = 0
    max_queued: Annotated[int, Field(ge=0)] = 0
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    max_live_cells: Annotated[int, Field(ge=1)] | None = None
    max_ram_bytes: Annotated[int, Field(ge=1)] | None = None
    max_disk_bytes: Annotated[int, Field(ge=1)] | None = None
    guaranteed_share: Annotated[float, Field(ge=0, le=1)] | None = None
    max_sessions: Annotated[int, Field(ge=0)] = 0
    max_responses: Annotated[int, Field(ge=0)] = 0
    max_pinned: Annotated[int, Field(ge=0)] = 0
    max_transcript_bytes: Annotated[int, Field(ge=0)] = 0
    idle_seconds: Annotated[float, Field(ge=0)] = 0.0
    lifetime_seconds: Annotated[float, Field(ge=0)] = 0.0


class PublicBody(_Body):
    name: str
    content: str
    role: Annotated[str, Field(min_length=1, max_length=64)] | None = "system"


def admin_routes(gateway: Gateway) -> APIRouter:
    """Routes over the gateway's state."""
    router = APIRouter(prefix="/v1/admin")
    state, limit = gateway.state, gateway.settings.max_body_bytes

    @router.get("/tenants", **described("Operator", "Tenants and their limits", TenantList))
    async def tenants() -> Response:
        found = await asyncio.to_thread(state.tenants.all)
        return _json({"object": "list", "data": [_tenant(tenant) for tenant in found]})

    @router.post(
        "/tenants/{name}/limits",
        **described(
            "Operator", "Change a tenant's limits; those that are not named stay", TenantBody, body=LimitsBody, errors=(404,)
        ),
    )
    async def change(name: str, request: Request) -> Response:
        body = await read_body(request, LimitsBody, limit)
        changes = body.model_dump(exclude_unset=True)
        return _json(_tenant(await asyncio.to_thread(lambda: state.tenants.limit(name, **changes))))

    @router.get(
        "/sessions", **described("Operator", "Everybody's sessions, last used first, and where their KV is", SessionOverview)
    )
    async def sessions(limit: _Limit = 25, offset: _Offset = 0) -> Response:
        return _json(await overview(gateway, limit, offset))

    @router.get("/public", **described("Operator", "Public prefixes", PublicPrefixList))
    async def public() -> Response:
        found = await asyncio.to_thread(state.public.all)
        return _json({"object": "list", "data": [{"name": one.name, "bytes": len(one.content.encode())} for one in found]})

    @router.post(
        "/public",
        **described("Operator", "Declare a public prefix", PublicPrefixBody, body=PublicBody, status=201, errors=(409,)),
    )
    async def declare(request: Request) -> Response:
        body = await read_body(request, PublicBody, limit)
        made = await asyncio.to_thread(state.public.add, body.name, body.content, body.role)
        return _json({"name": made.name, "bytes": len(made.content.encode())}, 201)

    @router.delete("/public/{name}", **described("Operator", "Withdraw a public prefix", PublicPrefixGone, errors=(404,)))
    async def withdraw(name: str) -> Response:
        await asyncio.to_thread(state.public.remove, name)
        return _json({"name": name, "deleted": True})

    return router


def _tenant(tenant: Tenant) -> dict[str, object]:
    return {"name": tenant.name, "limits": asdict(tenant.limits)}


def _json(value: object, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")
