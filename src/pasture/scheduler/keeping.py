"""What a conversation's owner may ask of the engine thread: where its KV is, to keep it, to hand it out, to take it in.

    export    "PKV1", fingerprint; then each slab: p0, p1, length (u32, u32, u64), payload; last a BLAKE2b of all before

The functions that take a scheduler run on the engine thread (`EngineLoop.ask`); packing and checking run anywhere. An export
may come from anybody: its lengths, checksum and model are verified here, its payloads by the codec, and it reaches no namespace
but the one that it is filed under.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np

from pasture.core.errors import Conflict, EngineError, RequestError
from pasture.core.storage import BLOCK_TOKENS, Bytes, Pin, SlabCodec
from pasture.core.values import Namespace, Slab, Whereabouts
from pasture.scheduler.scheduler import Scheduler

MAGIC = b"PKV1"
DIGEST_BYTES = 32
_FINGERPRINT = struct.Struct("<I")
_SLAB = struct.Struct("<IIQ")

Packed = tuple[int, int, Bytes]
"""p0, p1, payload"""


class SafePin:
    """A pin that any thread may release: the engine's thread does it."""

    def __init__(self, pin: Pin, on_engine: Callable[[Callable[[Scheduler], None]], object]) -> None:
        self._pin = pin
        self._on_engine = on_engine

    def release(self) -> None:
        self._on_engine(lambda _: self._pin.release())


def locate(scheduler: Scheduler, namespace: Namespace, tokens: array[int]) -> Whereabouts:
    """Engine thread."""
    match = scheduler.pool.tree.match(namespace, tokens)
    shared = 0
    for node in match.node.path():
        if len(node.holders) > 1:
            shared += match.offset if node is match.node else len(node)
    return Whereabouts(match.length, shared, scheduler.resting.store.reach(namespace, tokens))


def live(scheduler: Scheduler) -> list[tuple[Namespace, array[int]]]:
    """Engine thread: what every sequence in the live cache holds, those that run included."""
    return [(sequence.namespace, sequence.tokens()) for sequence in scheduler.pool.sequences.values() if sequence.length]


def verify(scheduler: Scheduler) -> None:
    """Engine thread: check the books, and have what was restored read back. Raises InvariantBroken."""
    scheduler.pool.check()
    scheduler.resting.samples.read_back()


def save(scheduler: Scheduler, namespace: Namespace, tokens: array[int]) -> None:
    """Engine thread: have what is live of these tokens saved, as far as somebody idle holds it."""
    scheduler.ahead.give_way()  # who computes ahead holds what its conversation ends in
    for node in scheduler.pool.tree.match(namespace, tokens).node.path():
        idle = [sequence for sequence in node.holders if sequence.idle]
        if idle:
            scheduler.resting.save(min(idle, key=lambda sequence: sequence.length))
            return


def take(scheduler: Scheduler, namespace: Namespace, tokens: array[int]) -> tuple[Slab, ...]:
    """Engine thread: what RAM has."""
    store = scheduler.resting.store
    reach = store.reach(namespace, tokens)
    return store.take(namespace, tokens, 0, reach) if reach else ()


def put(scheduler: Scheduler, namespace: Namespace, tokens: array[int], packed: Sequence[Packed], codec: SlabCodec) -> int:
    """Engine thread: file an export's slabs. Raises RequestError where one is not what it claims."""
    store = scheduler.resting.store
    for p0, p1, payload in packed:
        try:
            slab = codec.unpack(payload, p0, p1)
        except EngineError as error:
            raise RequestError(f"the exported KV cannot be used: {error}") from error
        missing = store.gap(namespace, tokens[:p1], p0)
        if missing < p0:  # a state that cannot be cut, without its beginning
            raise RequestError(f"the exported KV cannot be used: it has no part that begins at {missing}")
        if missing < p1:
            store.put(namespace, tokens[:p1], slab.cut(max(p0, missing), p1))
    return packed[-1][1] if packed else 0


def pack(slabs: Sequence[Slab], codec: SlabCodec) -> bytes:
    """Slabs as one export."""
    parts = [MAGIC, _FINGERPRINT.pack(len(codec.fingerprint)), codec.fingerprint]
    for slab in slabs:
        payload = codec.pack(slab).tobytes()
        parts += [_SLAB.pack(slab.p0, slab.p1, len(payload)), payload]
    body = b"".join(parts)
    return body + blake2b(body, digest_size=DIGEST_BYTES).digest()


def unpack(exported: bytes, n_tokens: int, fingerprint: bytes) -> list[Packed]:
    """An export's slabs, ascending from 0 without gaps, each from a block's beginning on. Raises Conflict, RequestError."""
    body, digest = exported[:-DIGEST_BYTES], exported[-DIGEST_BYTES:]
    if not body.startswith(MAGIC) or blake2b(body, digest_size=DIGEST_BYTES).digest() != digest:
        raise RequestError("the exported KV is damaged: its checksum is wrong")
    try:
        at = len(MAGIC)
        (length,) = _FINGERPRINT.unpack_from(body, at)
        at += _FINGERPRINT.size
        if body[at : at + length] != fingerprint:
            raise Conflict("the exported KV is of another model, another quantisation or another kind of cache")
        at += length
        packed: list[Packed] = []
        end = 0
        while at < len(body):
            p0, p1, size = _SLAB.unpack_from(body, at)
            at += _SLAB.size
            if p0 != end or p0 % BLOCK_TOKENS or not p0 < p1 <= n_tokens or at + size > len(body):
                raise RequestError("the exported KV is not of these tokens")
            # a copy, so that the codec gets memory that is aligned
            packed.append((p0, p1, np.frombuffer(body, dtype=np.uint8, count=size, offset=at).copy()))
            at, end = at + size, p1
    except struct.error:
        raise RequestError("the exported KV is cut short") from None
    return packed
