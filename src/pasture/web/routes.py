"""The pages, their files, and what they ask for. The files are read once and served from a fixed list: no path leads elsewhere.

The pages may run their own scripts only and talk to this server only (Content-Security-Policy), and no other page may frame
them. What a prefix says is the one thing here that people wrote: it has a route of its own, below the administrator's.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated

import orjson
from fastapi import APIRouter, Path, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse

from pasture.core.ports import Service
from pasture.web.live import Live

_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
    "LICENSE": "text/plain; charset=utf-8",
}
SHOWN_TOKENS = 320
"""of a prefix's text: enough to recognise it by"""
_Number = Annotated[int, Path(ge=0, lt=1 << 53)]
"""of a prefix; a page's numbers go no further"""
_SECURITY = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}


class _Events(StreamingResponse):
    media_type = "text/event-stream"


@dataclass(frozen=True, slots=True)
class StaticFile:
    content: bytes
    media_type: str
    etag: str


def static_files() -> dict[str, StaticFile]:
    """Name -> file, of all that ship with the package."""
    found = {}
    for entry in files("pasture.web").joinpath("static").iterdir():
        media_type = _TYPES.get(entry.name.rpartition(".")[2])
        if media_type is not None:
            content = entry.read_bytes()
            found[entry.name] = StaticFile(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:20]}"')
    return found


def web_routes(service: Service, live: Live) -> APIRouter:
    """`/`, `/chat`, `/web/...`, `/v1/live`, `/v1/live/now`, and `/v1/admin/prefixes/N`."""
    router = APIRouter()
    shipped = static_files()

    @router.get("/", include_in_schema=False)
    async def dashboard(request: Request) -> Response:
        return _file(shipped["index.html"], request)

    @router.get("/chat", include_in_schema=False)
    async def chat(request: Request) -> Response:
        return _file(shipped["chat.html"], request)

    @router.get("/web/{name}", include_in_schema=False)
    async def asset(name: str, request: Request) -> Response:
        if name not in shipped:
            raise HTTPException(404, "there is no such file")
        return _file(shipped[name], request)

    @router.get("/v1/live", tags=["Operator"], response_class=_Events, summary="The dashboard's numbers, two a second")
    async def stream() -> Response:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return _Events(live.events(), headers=headers)

    @router.get("/v1/live/now", tags=["Operator"], summary="The dashboard's numbers, once")
    async def now() -> Response:
        return Response(live.snapshot(), media_type="application/json", headers={"cache-control": "no-store"})

    @router.get(
        "/v1/admin/prefixes/{number}",
        tags=["Operator"],
        summary="The beginning of a cached prefix",
        responses={404: {"description": "No such prefix is in the live cache now"}},
    )
    async def prefix(number: _Number) -> Response:
        found = await service.open_prefix(number, SHOWN_TOKENS)
        if found is None:
            raise HTTPException(404, "no such prefix is in the live cache now")
        text = b"".join(service.vocabulary.piece(token, special=True) for token in found.tokens)
        answer = {
            "number": number,
            "text": text.decode(errors="replace"),
            "tokens_shown": len(found.tokens),
            "tokens": found.n_tokens,
            "ram_tokens": found.ram_tokens,
            "slow_tokens": dict(found.slow_tokens),
        }
        return Response(orjson.dumps(answer), media_type="application/json", headers={"cache-control": "no-store"})

    return router


def _file(file: StaticFile, request: Request) -> Response:
    headers = {"etag": file.etag, "cache-control": "no-cache", **_SECURITY}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
