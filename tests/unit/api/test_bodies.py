"""What reading a body costs everybody else."""

from __future__ import annotations

import threading

import pytest
from fastapi import Request
from pydantic import BaseModel, ValidationError, field_validator
from starlette.types import Message

from pasture.api.bodies import INLINE_BYTES, read_body
from pasture.core.errors import RequestError


class Noting(BaseModel):
    """Knows the thread on which it was made."""

    text: str
    made_by: str = ""

    @field_validator("made_by", mode="before")
    @classmethod
    def _thread(cls, _: object) -> str:
        return threading.current_thread().name


def sent(body: bytes) -> Request:
    async def receive() -> Message:
        return {"type": "http.request", "body": body}

    return Request({"type": "http", "headers": []}, receive)


@pytest.mark.parametrize("large", [False, True])
async def test_a_large_body_is_parsed_beside_the_event_loop(large: bool) -> None:
    text = "x" * (INLINE_BYTES if large else 10)
    found = await read_body(sent(b'{"text": "%s", "made_by": ""}' % text.encode()), Noting, 1 << 20)
    assert found.text == text
    assert (found.made_by != threading.current_thread().name) is large


@pytest.mark.parametrize("n_bytes", [1, INLINE_BYTES])
async def test_what_is_wrong_with_a_body_is_said_whatever_its_size(n_bytes: int) -> None:
    filling = b"x" * n_bytes
    for body in (b'{"text": "%s' % filling, b'["%s"]' % filling, b'{"functions": ["%s"]}' % filling):
        with pytest.raises(RequestError):
            await read_body(sent(body), Noting, 1 << 20)
    with pytest.raises(ValidationError):
        await read_body(sent(b'{"other": "%s"}' % filling), Noting, 1 << 20)
