"""Frames over a TCP connection between two machines of a cluster, and how both ends prove that they belong to it.

    u32 bytes of the frame, u64 bytes of payload, the frame (see `messages`), the payload

Before the first frame both ends answer the other's challenge with an HMAC under the cluster's key; who cannot is dropped before
a byte of his is read as a frame. The connection itself is not encrypted: it belongs on a private network. Event loop only.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import struct
from collections.abc import Callable
from hashlib import blake2b
from typing import Generic, TypeVar

from pasture.cluster.messages import BadFrame, Frame, FromReplica, ToReplica, encode, from_replica, to_replica

log = logging.getLogger(__name__)

_HEAD = struct.Struct("<IQ")
_CHALLENGE_BYTES = 32
_PROOF_BYTES = 32
GREETING = b"pasture cluster 2\n"
MAX_FRAME_BYTES = 64 << 20
MAX_PAYLOAD_BYTES = 1 << 36
GREETING_SECONDS = 5.0

Received = TypeVar("Received")


class NotOfThisCluster(Exception):
    """The other end speaks another language, or does not have the key."""


class Wire(Generic[Received]):
    """One connection after the greeting."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, decode: Callable[[bytes], Received]) -> None:
        self._reader = reader
        self._writer = writer
        self._decode = decode

    def send(self, frame: Frame, payload: bytes = b"") -> None:
        """Queue a frame; nothing happens on a connection that is closed."""
        if self._writer.is_closing():
            return
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise ValueError(f"{len(payload)} bytes are too many for one frame")
        body = encode(frame)
        self._writer.write(_HEAD.pack(len(body), len(payload)) + body)
        if payload:
            self._writer.write(payload)

    async def receive(self) -> tuple[Received, bytes]:
        """The next frame. Raises ConnectionError at the end, and for a frame that is none."""
        try:
            n_bytes, n_payload = _HEAD.unpack(await self._reader.readexactly(_HEAD.size))
            if n_bytes > MAX_FRAME_BYTES or n_payload > MAX_PAYLOAD_BYTES:
                raise ConnectionError(f"a frame of {n_bytes} and {n_payload} bytes")
            frame = self._decode(await self._reader.readexactly(n_bytes))
            payload = await self._reader.readexactly(n_payload) if n_payload else b""
        except BadFrame as error:
            log.warning("a frame that nobody understands; the connection is closed: %s", error)
            raise ConnectionError(str(error)) from error
        except (asyncio.IncompleteReadError, OSError) as error:
            raise ConnectionError(str(error)) from error
        return frame, payload

    @property
    def unsent_bytes(self) -> int:
        return self._writer.transport.get_write_buffer_size()

    async def drained(self) -> None:
        """Wait until most of what was sent is on its way."""
        await self._writer.drain()

    def close(self) -> None:
        """At once; what was not sent is lost."""
        self._writer.transport.abort()


async def connect(host: str, port: int, key: bytes) -> Wire[FromReplica]:
    """A connection to a server of the same cluster. Raises ConnectionError or NotOfThisCluster, within seconds."""
    try:
        async with asyncio.timeout(GREETING_SECONDS):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                await _greet(reader, writer, key, mine=b"client", theirs=b"server")
            except BaseException:
                writer.transport.abort()
                raise
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        raise ConnectionError(f"{host} port {port}: {error or type(error).__name__}") from error
    return Wire(reader, writer, from_replica)


async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes) -> Wire[ToReplica] | None:
    """The server's side of `connect`; None, and the connection dropped, for a stranger."""
    try:
        async with asyncio.timeout(GREETING_SECONDS):
            await _greet(reader, writer, key, mine=b"server", theirs=b"client")
    except (OSError, TimeoutError, asyncio.IncompleteReadError, NotOfThisCluster):
        writer.transport.abort()
        return None
    return Wire(reader, writer, to_replica)


async def _greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes, *, mine: bytes, theirs: bytes) -> None:
    challenge = secrets.token_bytes(_CHALLENGE_BYTES)
    writer.write(GREETING + challenge)
    if await reader.readexactly(len(GREETING)) != GREETING:
        raise NotOfThisCluster("the other end is no pasture of this version")
    other = await reader.readexactly(_CHALLENGE_BYTES)
    writer.write(_proof(key, mine, other, challenge))
    if not hmac.compare_digest(await reader.readexactly(_PROOF_BYTES), _proof(key, theirs, challenge, other)):
        raise NotOfThisCluster("the other end does not have this cluster's key")


def _proof(key: bytes, role: bytes, asked: bytes, own: bytes) -> bytes:
    """Of whoever plays `role` and was `asked`; the role and both challenges, so that nothing can be mirrored."""
    return blake2b(role + asked + own, key=blake2b(key).digest(), digest_size=_PROOF_BYTES).digest()
