"""Blocks as bytes, for files and networks, and back: one versioned layout, checked to the last bit before anybody sees inside.

    header (144 bytes, little endian)                                        tokens section          payload section
    magic 8 | version 2 | form 1 | flags 1 | p0 4 | p1 4                     n_token_bytes           n_payload_bytes
    n_token_bytes 4 | n_payload_bytes 8 | name 32 | parent 32 | owner 32 | xxh3 16

The checksum covers the header before it and both sections. `name` is what a tier files the block under: the block's key, or
what a `Wire` makes of it; `owner` is the same for the root of its chain. `PlainWire` writes tokens and payload as they are;
`pasture.tiers.sealed` encrypts them in the same layout, so that files can be listed, checked for damage and evicted without the
secret. Both sections start at multiples of four bytes. Does not know what a payload means. Pure functions and stateless
objects; any thread.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import xxhash

from pasture.core.storage import BLOCK_TOKENS, BlockKey, Bytes
from pasture.core.values import Form
from pasture.tiers.block import Block
from pasture.tiers.keys import KEY_BYTES, Address, child_key

MAGIC = b"pasture\x00"
VERSION = 2
TOKEN_BYTES = 4
MAX_POSITION = 1 << 31
MAX_PAYLOAD_BYTES = 1 << 32
"""no block is that large: a header that says so is damaged, and nothing is allocated for it"""

NOBODY = bytes(KEY_BYTES)
"""stands in a header for no owner"""

_CHECKED = struct.Struct(f"<8sHBBIIIQ{KEY_BYTES}s{KEY_BYTES}s{KEY_BYTES}s")
CHECKED_BYTES = _CHECKED.size
"""the header without its checksum"""
CHECKSUM_BYTES = 16
HEADER_BYTES = CHECKED_BYTES + CHECKSUM_BYTES

SEALED_KEYS_BYTES = 3 * KEY_BYTES
"""a sealed tokens section begins with the block's key, its parent's and its owner"""
SEAL_BYTES = 28
"""nonce and tag of a sealed section"""

_WHOLE, _SEALED = 1, 2
_FORMS = (Form.RAW, Form.LOSSLESS, Form.Q8_0, Form.Q4_0)
_CHUNK_BYTES = 4 << 20
"""hashed in one go"""


class BadBlock(Exception):
    """Bytes that are not a block, or not this one; the message says in which way. Never leaves the tiers."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a block says about itself in the clear."""

    form: Form
    whole: bool
    sealed: bool
    p0: int
    p1: int
    n_token_bytes: int
    n_payload_bytes: int
    name: bytes
    parent: bytes
    """the name of the block before it"""
    owner: bytes
    """the name of the root of its chain, or NOBODY"""

    @property
    def n_bytes(self) -> int:
        """Of header and sections together."""
        return HEADER_BYTES + self.n_token_bytes + self.n_payload_bytes

    def pack(self) -> bytes:
        """Everything but the checksum."""
        return _CHECKED.pack(
            MAGIC,
            VERSION,
            _FORMS.index(self.form),
            _WHOLE * self.whole | _SEALED * self.sealed,
            self.p0,
            self.p1,
            self.n_token_bytes,
            self.n_payload_bytes,
            self.name,
            self.parent,
            self.owner,
        )


class Wire(Protocol):
    """How a tier writes blocks down. `PlainWire`, or a wrapper that keeps them secret."""

    def name(self, key: BlockKey) -> bytes:
        """32 bytes to file the block under; they and nothing else of the key may be seen by others."""
        ...

    def encode(self, block: Block) -> tuple[bytes, Bytes]:
        """Header with tokens section, and payload section: written one after the other. Copies no payload needlessly."""
        ...

    def decode(self, data: Bytes) -> Block:
        """The block, its payload a view of `data` where that is possible. Raises BadBlock."""
        ...

    def identify(self, header: Header, section: bytes) -> tuple[Address, array[int]]:
        """Address and tokens from a header and its tokens section alone. Raises BadBlock."""
        ...


class PlainWire:
    """Names are keys, and the sections are what they hold."""

    def name(self, key: BlockKey) -> bytes:
        return key

    def encode(self, block: Block) -> tuple[bytes, Bytes]:
        section = token_bytes(block.tokens)
        header = header_of(block, self.name, sealed=False, n_token_bytes=len(section), n_payload_bytes=block.payload.nbytes)
        return frame(header, section, block.payload), block.payload

    def decode(self, data: Bytes) -> Block:
        header, section, payload = parts(data)
        address, tokens = self.identify(header, section)
        return Block(address, tokens, header.form, payload, header.whole, owner_in(header.owner))

    def identify(self, header: Header, section: bytes) -> tuple[Address, array[int]]:
        if header.sealed:
            raise BadBlock("it is encrypted, and no key was given")
        return identified(header, BlockKey(header.name), BlockKey(header.parent), section)


def read_header(data: bytes | memoryview) -> Header:
    """The header at the beginning of `data`, consistent in itself; the checksum is not looked at. Raises BadBlock."""
    if len(data) < HEADER_BYTES:
        raise BadBlock(f"{len(data)} bytes are no header")
    magic, version, form, flags, p0, p1, n_tokens, n_payload, name, parent, owner = _CHECKED.unpack_from(data)
    if magic != MAGIC:
        raise BadBlock("it does not begin like a block")
    if version != VERSION:
        raise BadBlock(f"it is of version {version}, not {VERSION}")
    if form >= len(_FORMS) or flags & ~(_WHOLE | _SEALED):
        raise BadBlock(f"form {form} with flags {flags} does not exist")
    if p0 % BLOCK_TOKENS or not p0 < p1 <= min(p0 + BLOCK_TOKENS, MAX_POSITION):
        raise BadBlock(f"[{p0}, {p1}) is no block")
    sealed = bool(flags & _SEALED)
    if n_tokens != (p1 - p0) * TOKEN_BYTES + sealed * (SEALED_KEYS_BYTES + SEAL_BYTES):
        raise BadBlock(f"{n_tokens} bytes are not the tokens of [{p0}, {p1})")
    if not sealed * SEAL_BYTES <= n_payload <= MAX_PAYLOAD_BYTES:
        raise BadBlock(f"a payload of {n_payload} bytes does not exist")
    return Header(_FORMS[form], bool(flags & _WHOLE), sealed, p0, p1, n_tokens, n_payload, name, parent, owner)


def parts(data: Bytes) -> tuple[Header, bytes, Bytes]:
    """Header, tokens section and payload section, lengths and checksum verified. Raises BadBlock."""
    header = read_header(data.data)
    if data.nbytes != header.n_bytes:
        raise BadBlock(f"{data.nbytes} bytes instead of {header.n_bytes}")
    payload_start = HEADER_BYTES + header.n_token_bytes
    section, payload = data[HEADER_BYTES:payload_start].tobytes(), data[payload_start:]
    if data[CHECKED_BYTES:HEADER_BYTES].tobytes() != _checksum(data[:CHECKED_BYTES].tobytes(), section, payload):
        raise BadBlock("its checksum does not match")
    return header, section, payload


def frame(header: Header, section: bytes, payload: Bytes) -> bytes:
    """Header, checksum and tokens section: what is written before the payload section."""
    packed = header.pack()
    return packed + _checksum(packed, section, payload) + section


def header_of(block: Block, name: NameOf, *, sealed: bool, n_token_bytes: int, n_payload_bytes: int) -> Header:
    """The header of a block whose sections have these lengths."""
    address = block.address
    return Header(
        block.form,
        block.whole,
        sealed,
        address.p0,
        address.p1,
        n_token_bytes,
        n_payload_bytes,
        name(address.key),
        name(address.parent),
        NOBODY if block.owner is None else name(block.owner),
    )


def owner_in(name: bytes) -> BlockKey | None:
    """An owner as it was written down in the clear."""
    return None if name == NOBODY else BlockKey(name)


def identified(header: Header, key: BlockKey, parent: BlockKey, section: bytes) -> tuple[Address, array[int]]:
    """Address and tokens, if the key is that of these tokens behind that parent. Raises BadBlock."""
    if len(section) != (header.p1 - header.p0) * TOKEN_BYTES:
        raise BadBlock(f"{len(section)} bytes are not the tokens of [{header.p0}, {header.p1})")
    tokens = array("i", np.frombuffer(section, "<i4").astype(np.intc).tobytes())
    if child_key(parent, tokens) != key:
        raise BadBlock("its key is not that of its tokens")
    return Address(key, parent, header.p0, header.p1), tokens


def token_bytes(tokens: Iterable[int]) -> bytes:
    """Tokens as a plain tokens section."""
    return np.fromiter(tokens, "<i4").tobytes()


class NameOf(Protocol):
    def __call__(self, key: BlockKey, /) -> bytes: ...


def _checksum(packed: bytes, section: bytes, payload: Bytes) -> bytes:
    state = xxhash.xxh3_128(packed)
    state.update(section)
    for start in range(0, payload.nbytes, _CHUNK_BYTES):
        state.update(payload[start : start + _CHUNK_BYTES].data)
    return state.digest()
