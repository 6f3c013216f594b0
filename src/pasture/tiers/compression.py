"""Stored blocks grow smaller as RAM fills up: which step next, for which block, and the lossless step itself.

    auto       RAW -> LOSSLESS where it is worth it -> Q8_0 -> Q4_0, coldest first, above a watermark and only down to it
    q8_0 ...   everything that is stored, in that one form: in RAM soon, on slow tiers from the beginning
    off        nothing

What pins hold and what many conversations share comes last. No form outside of `allowed` is ever used (how far each is from the
truth is measured elsewhere). Blocks are immutable: a smaller one takes the place of a larger one with the same address.

Runs in background threads; no lock is held while bytes are worked on. ggml's forms are the codec's business. LOSSLESS is byte
planes (f16 exponents beside each other) through zstandard, behind the length of what went in.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Collection
from dataclasses import replace
from enum import StrEnum

import numpy as np
import zstandard

from pasture.core.errors import EngineError
from pasture.core.storage import Bytes, SlabCodec
from pasture.core.values import Form
from pasture.tiers.block import Block
from pasture.tiers.memory import MemoryTier

SQUEEZE_ABOVE = 0.8
"""share of the RAM budget at which `auto` begins, and to which it goes back"""
WORTH_LOSSLESS = 0.9
"""share of the size that lossless must come down to; it has to be undone at every fetch"""
_LENGTH = struct.Struct("<Q")
_ZSTD_LEVEL = 1
_TRIES = 16
"""lossless attempts of which none was worth it, before `auto` goes straight to the next step"""
_MOST_EXPANSION = 4096
"""a payload that claims to have been larger by more than this was not made here"""


class Compression(StrEnum):
    """What happens to stored blocks (`--kv-compress`)."""

    AUTO = "auto"
    OFF = "off"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"
    LOSSLESS = "lossless"


_LADDERS = {
    Compression.AUTO: (Form.LOSSLESS, Form.Q8_0, Form.Q4_0),
    Compression.OFF: (),
    Compression.Q8_0: (Form.Q8_0,),
    Compression.Q4_0: (Form.Q4_0,),
    Compression.LOSSLESS: (Form.LOSSLESS,),
}

EVERY_FORM = frozenset(Form)


def ladder(compression: Compression, allowed: Collection[Form] = EVERY_FORM) -> tuple[Form, ...]:
    """The steps that a block may go down, mildest first."""
    return tuple(form for form in _LADDERS[compression] if form in allowed)


_local = threading.local()


def _compressor() -> zstandard.ZstdCompressor:
    """One a thread: they cannot be shared."""
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
    found: zstandard.ZstdCompressor = _local.compressor
    return found


def deflate(payload: Bytes) -> Bytes:
    """LOSSLESS of a RAW payload."""
    planes = np.concatenate((payload[0::2], payload[1::2]))
    packed = _compressor().compress(planes.data)
    return np.frombuffer(_LENGTH.pack(payload.nbytes) + packed, np.uint8)


def inflate(payload: Bytes) -> Bytes:
    """What `deflate` was given. Raises EngineError on anything it did not make."""
    data = payload.tobytes()
    if len(data) < _LENGTH.size:
        raise EngineError("a compressed block lacks its length")
    (length,) = _LENGTH.unpack_from(data)
    frame = data[_LENGTH.size :]
    try:
        claimed = zstandard.frame_content_size(frame)
        if claimed != length or length > _MOST_EXPANSION * len(data):
            raise EngineError(f"a compressed block of {length} bytes claims to hold {claimed}")
        planes = np.frombuffer(zstandard.ZstdDecompressor().decompress(frame), np.uint8)
    except zstandard.ZstdError as error:
        raise EngineError(f"a compressed block cannot be read: {error}") from error
    if len(planes) != length:
        raise EngineError(f"a compressed block of {length} bytes held {len(planes)}")
    raw = np.empty(length, np.uint8)
    even = (length + 1) // 2
    raw[0::2], raw[1::2] = planes[:even], planes[even:]
    return raw


class Squeezer:
    """Takes one block a call one step down its ladder. One thread steps; any may ask for what is to be written."""

    def __init__(self, memory: MemoryTier, codec: SlabCodec, compression: Compression, allowed: Collection[Form]) -> None:
        """The tier must have been made with `squeeze_stages=len(ladder(compression, allowed))`."""
        self._memory = memory
        self._codec = codec
        self._by_pressure = compression is Compression.AUTO
        self._ladder = ladder(compression, allowed)
        self._lock = threading.Lock()
        self._worthless = 0
        """lossless attempts in a row that did not pay"""
        self.bytes_saved = 0
        self.in_flight_bytes = 0
        """of the block that is being squeezed now"""

    @property
    def wanted(self) -> bool:
        """Whether there is pressure, or no need for it."""
        if not self._ladder:
            return False
        return not self._by_pressure or self._memory.used_bytes > SQUEEZE_ABOVE * self._memory.budget_bytes

    def step(self) -> bool:
        """Squeeze one block; False when nothing is wanted or nothing is left to squeeze."""
        if not self.wanted:
            return False
        found = self._memory.next_to_squeeze()
        if found is None:
            return False
        block, stage = found
        self.in_flight_bytes = block.n_bytes
        try:
            smaller, stage = self._next(block, stage)
        finally:
            self.in_flight_bytes = 0
        self._put(block, smaller, stage)
        return True

    def at_rest(self, block: Block) -> Block:
        """The block as everything rests where that is in one form, in RAM too from now on; else as it is."""
        if self._by_pressure or not self._ladder:
            return block
        smaller, stage = self._next(block, 0)
        self._put(block, smaller, stage)
        return smaller

    def _put(self, block: Block, smaller: Block, stage: int) -> None:
        if self._memory.replace(block, smaller, stage):
            with self._lock:
                self.bytes_saved += block.n_bytes - smaller.n_bytes

    def _next(self, block: Block, stage: int) -> tuple[Block, int]:
        """The block one step down, and the stage it is at then."""
        form = self._ladder[stage]
        if block.form is form or self._skips(form):
            return block, stage + 1
        try:
            return self._squeeze(block, form), stage + 1
        except EngineError:  # it will be refused when somebody wants it; there is nothing to be done to it here
            return block, len(self._ladder)

    def _skips(self, form: Form) -> bool:
        """Lossless as one step of several is left out where it never pays on this model."""
        return form is Form.LOSSLESS and len(self._ladder) > 1 and self._worthless >= _TRIES

    def _squeeze(self, block: Block, form: Form) -> Block:
        """The block in `form`; the block itself where that would not pay."""
        if form is Form.LOSSLESS:
            if block.form is not Form.RAW:
                return block
            deflated = deflate(block.payload)
            pays = deflated.nbytes <= WORTH_LOSSLESS * block.n_bytes
            self._worthless = 0 if pays else self._worthless + 1
            return replace(block, form=form, payload=deflated) if pays else block
        raw = inflate(block.payload) if block.form is Form.LOSSLESS else block.payload
        squeezed = self._codec.squeeze(raw, form)
        return replace(block, form=form, payload=squeezed) if squeezed.nbytes < block.n_bytes else block
