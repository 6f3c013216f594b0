"""What the wire format refuses, and in which order: nothing unverified gets past it."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import xxhash

from pasture.core.storage import Bytes
from pasture.core.values import Form
from pasture.tiers.wire import CHECKED_BYTES, HEADER_BYTES, BadBlock, PlainWire, read_header
from tests.blocks import block_at, conversation, path, same

TOKENS = conversation(1, 100)
FULL, SHORT = path(TOKENS)


def encoded(payload_bytes: int = 500) -> Bytes:
    head, payload = PlainWire().encode(block_at(SHORT, TOKENS, payload_bytes))
    return np.frombuffer(head + payload.tobytes(), np.uint8).copy()


def rechecked(data: Bytes) -> Bytes:
    """With a checksum that is right again."""
    checksum = xxhash.xxh3_128_digest(data[:CHECKED_BYTES].tobytes() + data[HEADER_BYTES:].tobytes())
    data[CHECKED_BYTES:HEADER_BYTES] = np.frombuffer(checksum, np.uint8)
    return data


@pytest.mark.parametrize("form", list(Form))
@pytest.mark.parametrize("whole", [False, True])
def test_every_form_comes_back(form: Form, whole: bool) -> None:
    block = block_at(FULL, TOKENS, 321, form=form, whole=whole)
    head, payload = PlainWire().encode(block)
    assert payload is block.payload, "nothing is copied on the way out"
    data = np.frombuffer(head + payload.tobytes(), np.uint8)
    found = PlainWire().decode(data)
    assert same(found, block)
    assert np.shares_memory(found.payload, data), "nor on the way in"


def test_an_empty_payload_is_a_block() -> None:
    assert PlainWire().decode(encoded(0)).payload.nbytes == 0


def test_every_flipped_bit_is_noticed() -> None:
    good = encoded(64)
    for position in range(good.nbytes):
        for bit in range(8):
            bad = good.copy()
            bad[position] ^= 1 << bit
            with pytest.raises(BadBlock):
                PlainWire().decode(bad)


def test_every_other_length_is_noticed() -> None:
    good = encoded(64)
    for length in range(good.nbytes):
        with pytest.raises(BadBlock):
            PlainWire().decode(good[:length])
    with pytest.raises(BadBlock, match="instead of"):
        PlainWire().decode(np.append(good, np.uint8(0)))


@pytest.mark.parametrize(
    ("offset", "layout", "value", "reason"),
    [
        (0, "<8s", b"GGUF\0\0\0\0", "does not begin"),
        (8, "<H", 3, "version 3"),
        (10, "<B", 4, "form 4"),
        (11, "<B", 4, "flags 4"),
        (12, "<I", 63, "is no block"),
        (16, "<I", 64, "is no block"),
        (16, "<I", 129, "is no block"),
        (16, "<I", 101, "are not the tokens"),
        (20, "<I", 0xFFFFFFFF, "are not the tokens"),
        (24, "<Q", (1 << 64) - 1, "does not exist"),
        (24, "<Q", 1 << 32, "instead of"),
        (32, "<32s", b"x" * 32, "not that of its tokens"),
        (64, "<32s", b"x" * 32, "not that of its tokens"),
        (HEADER_BYTES, "<i", 7, "not that of its tokens"),
    ],
)
def test_a_wrong_field_with_a_right_checksum_is_refused(offset: int, layout: str, value: object, reason: str) -> None:
    data = encoded()
    data[offset : offset + struct.calcsize(layout)] = np.frombuffer(struct.pack(layout, value), np.uint8)
    with pytest.raises(BadBlock, match=reason):
        PlainWire().decode(rechecked(data))


def test_a_header_tells_lengths_without_the_rest() -> None:
    data = encoded(500)
    header = read_header(data[:HEADER_BYTES].tobytes())
    assert (header.p0, header.p1, header.n_bytes, header.name) == (64, 100, data.nbytes, SHORT.key)
