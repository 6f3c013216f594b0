"""A session as one file, for another server: transcript, tokens, and its KV where there is any.

    "PASTURE-SESSION 1\\n"   u32 length, header (JSON)   u32 count, tokens (i32)   u64 length, KV   BLAKE2b-256 of all before

Little endian. The KV is the engine's own export, opaque here. A checksum tells damage, not intent: a file that somebody made up
is a valid session of theirs, and can hurt nobody else. Pure functions; any thread.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import orjson

from pasture.core.errors import RequestError
from pasture.sessions.values import Message

MAGIC = b"PASTURE-SESSION 1\n"
DIGEST_BYTES = 32
MAX_HEADER_BYTES = 16 << 20
"""of transcript and metadata: JSON takes many times its bytes once it is read"""

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Portable:
    """What is in such a file."""

    model: str
    """of which the tokens are"""
    messages: Sequence[Message]
    tokens: Sequence[int]
    blocks: bytes
    context: Mapping[str, object] = field(default_factory=dict)
    metadata: Mapping[str, object] = field(default_factory=dict)


def dump(session: Portable) -> bytes:
    """The file."""
    header = orjson.dumps(
        {
            "model": session.model,
            "messages": list(session.messages),
            "context": dict(session.context),
            "metadata": dict(session.metadata),
        }
    )
    tokens = array("i", session.tokens)
    parts = (
        MAGIC,
        _U32.pack(len(header)),
        header,
        _U32.pack(len(tokens)),
        tokens.tobytes(),
        _U64.pack(len(session.blocks)),
        session.blocks,
    )
    checksum = blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        checksum.update(part)
    return b"".join((*parts, checksum.digest()))


def load(data: bytes) -> Portable:
    """The session in a file. Raises RequestError for one that is damaged, or is none."""
    if not data.startswith(MAGIC):
        raise RequestError("this is not an exported session")
    body, digest = memoryview(data)[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    if blake2b(body, digest_size=DIGEST_BYTES).digest() != digest:
        raise RequestError("the exported session is damaged: its checksum is wrong")
    try:
        header_bytes, at = _part(body, len(MAGIC), _U32, 1)
        token_bytes, at = _part(body, at, _U32, 4)
        blocks, at = _part(body, at, _U64, 1)
        if len(header_bytes) > MAX_HEADER_BYTES:
            raise RequestError(f"the exported session's transcript is longer than {MAX_HEADER_BYTES} bytes")
        header = orjson.loads(header_bytes)  # refuses what could not be answered with: lone surrogates, deep nesting
        messages, context, metadata = header["messages"], header["context"], header["metadata"]
        model = header["model"]
    except (struct.error, ValueError, KeyError, TypeError, RecursionError):
        raise RequestError("the exported session cannot be read") from None
    if not (
        at == len(body)
        and isinstance(model, str)
        and isinstance(messages, list)
        and all(isinstance(message, dict) for message in messages)
        and isinstance(context, dict)
        and isinstance(metadata, dict)
    ):
        raise RequestError("the exported session cannot be read")
    return Portable(model, messages, array("i", bytes(token_bytes)), bytes(blocks), context, metadata)


def _part(body: memoryview, at: int, prefix: struct.Struct, unit_bytes: int) -> tuple[memoryview, int]:
    (count,) = prefix.unpack_from(body, at)
    start = at + prefix.size
    end = start + count * unit_bytes
    if end > len(body):
        raise ValueError("cut short")
    return body[start:end], end
