"""Reading a request's body: bounded, strictly JSON, checked against its schema. Bad input is a 400 or a 413, never a 500."""

from __future__ import annotations

from functools import partial
from typing import TypeVar

import orjson
from fastapi import Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from pasture.api.disconnect import ClientGone
from pasture.api.offload import off_loop
from pasture.api.patience import patience
from pasture.api.schemas import refuse_unsupported
from pasture.core.errors import RequestError

INLINE_BYTES = 1 << 16
"""of a body that is parsed at once; a larger one may take the time of many tokens, a MiB of small values 0.3 s"""

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, schema: type[Body], max_bytes: int) -> Body:
    """The body as `schema`. Raises HTTPException 413, RequestError or pydantic's ValidationError, each a clear answer."""
    data = await read_bytes(request, max_bytes)
    return await off_loop(len(data), partial(_parsed, data, schema), small=INLINE_BYTES)


def _parsed(data: bytes, schema: type[Body]) -> Body:
    try:
        value = orjson.loads(data or b"{}")
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object")
    refuse_unsupported(value)
    return schema.model_validate(value)


async def read_bytes(request: Request, max_bytes: int) -> bytes:
    """The body as it is. Raises HTTPException 413 or 408, or ClientGone."""
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise _too_large(max_bytes)
    chunks: list[bytes] = []
    size = 0
    try:
        async with patience(max_bytes) as moved:
            async for chunk in request.stream():
                size += len(chunk)
                moved(len(chunk))
                if size > max_bytes:
                    raise _too_large(max_bytes)
                chunks.append(chunk)
    except ClientDisconnect as error:
        raise ClientGone from error
    except TimeoutError as error:
        raise HTTPException(408, "the body took too long to come", headers={"connection": "close"}) from error
    return b"".join(chunks)


def _too_large(max_bytes: int) -> HTTPException:
    # the rest of the body stays unread, so the connection cannot carry another request
    return HTTPException(413, f"the body is larger than {max_bytes} bytes", headers={"connection": "close"})
