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
from typing import Generic, TypeVar, cast

from pasture.cluster.messages import BadFrame, Frame, FromReplica, ToReplica, encode, from_replica, to_replica

log = logging.getLogger(__name__)

_HEAD = struct.Struct("<IQ")
_CHALLENGE_BYTES = 32
_PROOF_BYTES = 32
GREETING = b"pasture cluster 3\n"
MAX_FRAME_BYTES = 64 << 20
MAX_PAYLOAD_BYTES = 1 << 36
GREETING_SECONDS = 5.0

Received = TypeVar("Received")


class NotOfThisCluster(Exception):
    """The other end speaks another language, or does not have the key."""


class Wire(asyncio.Protocol, Generic[Received]):
    """One connection: bytes to `read` during the greeting, frames once somebody listens.

    Frames are handed on in the turn of the loop that brings them. asyncio's streams would wake a task first, which takes longer
    than reading a frame where a process mostly waits.
    """

    def __init__(self, decode: Callable[[bytes], Received], on_open: Callable[[Wire[Received]], None] | None = None) -> None:
        self._decode = decode
        self._on_open = on_open
        self._on_frame: Callable[[Received, bytes], None] | None = None
        self._on_end: Callable[[], None] | None = None
        self._received = bytearray()
        self._come = asyncio.Event()
        """more bytes, or the end"""
        self._writable = asyncio.Event()
        self._writable.set()
        self._ended = False
        self._transport: asyncio.Transport
        self._loop: asyncio.AbstractEventLoop
        self.heard_at = 0.0
        """when bytes came last, by the loop's clock"""

    async def read(self, n_bytes: int) -> bytes:
        """The next bytes, before anybody listens. Raises ConnectionError at the end."""
        while len(self._received) < n_bytes:
            await self._more()
        return self._taken(n_bytes)

    async def receive(self) -> tuple[Received, bytes]:
        """The next frame and its payload, before anybody listens. Raises ConnectionError at the end, and where it is none."""
        try:
            while (whole := self._next()) is None:
                await self._more()
        except BadFrame as error:
            raise ConnectionError(str(error)) from error
        return whole

    def listen(self, on_frame: Callable[[Received, bytes], None], on_end: Callable[[], None]) -> None:
        """Hand on what has come and will come; `on_end` once, when that was all, or is no frame."""
        self._on_frame, self._on_end = on_frame, on_end
        self._hand_on()
        if self._ended:
            on_end()

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def send(self, frame: Frame, payload: bytes = b"") -> None:
        """Queue a frame; nothing happens on a connection that is closed."""
        if self._transport.is_closing():
            return
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise ValueError(f"{len(payload)} bytes are too many for one frame")
        body = encode(frame)
        self._transport.write(_HEAD.pack(len(body), len(payload)) + body)
        if payload:
            self._transport.write(payload)

    @property
    def unsent_bytes(self) -> int:
        return self._transport.get_write_buffer_size()

    async def drained(self) -> None:
        """Wait until most of what was sent is on its way, or never will be."""
        await self._writable.wait()

    def close(self) -> None:
        """At once; what was not sent is lost."""
        self._transport.abort()

    # Called by the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._loop = asyncio.get_running_loop()
        self.heard_at = self._loop.time()
        if self._on_open is not None:
            self._on_open(self)

    def data_received(self, data: bytes) -> None:
        self._received += data
        self.heard_at = self._loop.time()
        self._come.set()
        self._hand_on()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        self._come.set()
        self._writable.set()
        if self._on_end is not None:
            self._on_end()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # Inside

    async def _more(self) -> None:
        if self._ended:
            raise ConnectionError("the other end has closed the connection")
        self._come.clear()
        await self._come.wait()

    def _hand_on(self) -> None:
        try:
            while self._on_frame is not None and not self._transport.is_closing():
                if (whole := self._next()) is None:
                    return
                self._on_frame(*whole)
        except BadFrame as error:
            log.warning("a frame that nobody understands; the connection is closed: %s", error)
            self.close()

    def _next(self) -> tuple[Received, bytes] | None:
        """The first frame and its payload, once all of it is here. Raises BadFrame."""
        if len(self._received) < _HEAD.size:
            return None
        n_bytes, n_payload = _HEAD.unpack_from(self._received)
        if n_bytes > MAX_FRAME_BYTES or n_payload > MAX_PAYLOAD_BYTES:
            raise BadFrame(f"{n_bytes} bytes and {n_payload} behind them are too many")
        if len(self._received) < _HEAD.size + n_bytes + n_payload:
            return None
        frame = self._decode(self._taken(_HEAD.size + n_bytes)[_HEAD.size :])
        return frame, self._taken(n_payload) if n_payload else b""

    def _taken(self, n_bytes: int) -> bytes:
        with memoryview(self._received) as view:
            taken = bytes(view[:n_bytes])
        del self._received[:n_bytes]
        return taken


async def connect(host: str, port: int, key: bytes) -> Wire[FromReplica]:
    """A connection to a server of the same cluster. Raises ConnectionError or NotOfThisCluster, within seconds."""
    try:
        async with asyncio.timeout(GREETING_SECONDS):
            loop = asyncio.get_running_loop()
            _, wire = await loop.create_connection(lambda: Wire(from_replica), host, port)
            try:
                await _greet(wire, key, mine=b"client", theirs=b"server")
            except BaseException:
                wire.close()
                raise
    except (OSError, TimeoutError) as error:
        raise ConnectionError(f"{host} port {port}: {error or type(error).__name__}") from error
    return wire


async def serve(host: str, port: int, key: bytes, on_wire: Callable[[Wire[ToReplica]], None]) -> asyncio.Server:
    """Listen for `connect`; strangers are dropped before a byte of theirs is read as a frame."""
    greetings: set[asyncio.Task[None]] = set()

    async def greet(wire: Wire[ToReplica]) -> None:
        try:
            async with asyncio.timeout(GREETING_SECONDS):
                await _greet(wire, key, mine=b"server", theirs=b"client")
        except (OSError, TimeoutError, NotOfThisCluster):
            wire.close()
        else:
            on_wire(wire)

    def opened(wire: Wire[ToReplica]) -> None:
        greeting = asyncio.create_task(greet(wire))
        greetings.add(greeting)
        greeting.add_done_callback(greetings.discard)

    return await asyncio.get_running_loop().create_server(lambda: Wire(to_replica, opened), host, port)


async def _greet(wire: Wire[Received], key: bytes, *, mine: bytes, theirs: bytes) -> None:
    challenge = secrets.token_bytes(_CHALLENGE_BYTES)
    wire.write(GREETING + challenge)
    if await wire.read(len(GREETING)) != GREETING:
        raise NotOfThisCluster("the other end is no pasture of this version")
    other = await wire.read(_CHALLENGE_BYTES)
    wire.write(_proof(key, mine, other, challenge))
    if not hmac.compare_digest(await wire.read(_PROOF_BYTES), _proof(key, theirs, challenge, other)):
        raise NotOfThisCluster("the other end does not have this cluster's key")


def _proof(key: bytes, role: bytes, asked: bytes, own: bytes) -> bytes:
    """Of whoever plays `role` and was `asked`; the role and both challenges, so that nothing can be mirrored."""
    return blake2b(role + asked + own, key=blake2b(key).digest(), digest_size=_PROOF_BYTES).digest()
