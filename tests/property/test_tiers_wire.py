"""The block codec against anything: what it lets through is what was written, and everything else is a BadBlock.

`FUZZ_INPUTS=1000000 pytest tests/property/test_tiers_wire.py` runs the long version.
"""

from __future__ import annotations

import os
import random
from array import array

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from pasture.core.storage import BLOCK_TOKENS, BlockKey, Bytes
from pasture.core.values import Form
from pasture.tiers.block import Block
from pasture.tiers.keys import Address, child_key
from pasture.tiers.sealed import SealedWire
from pasture.tiers.wire import CHECKED_BYTES, HEADER_BYTES, BadBlock, PlainWire, Wire
from tests.blocks import block_at, blocks, conversation, path, same

N_INPUTS = int(os.environ.get("FUZZ_INPUTS", "20000"))
WIRES: dict[str, Wire] = {"plain": PlainWire(), "sealed": SealedWire(bytes(range(32)))}


@st.composite
def any_block(draw: st.DrawFn) -> Block:
    tokens = array("i", draw(st.lists(st.integers(-(1 << 31), (1 << 31) - 1), min_size=1, max_size=BLOCK_TOKENS)))
    parent = BlockKey(draw(st.binary(min_size=32, max_size=32)))
    p0 = BLOCK_TOKENS * draw(st.integers(0, (1 << 24)))
    payload = np.frombuffer(draw(st.binary(max_size=500)), np.uint8)
    owner = draw(st.none() | st.builds(BlockKey, st.binary(min_size=32, max_size=32).filter(any)))
    address = Address(child_key(parent, tokens), parent, p0, p0 + len(tokens))
    return Block(address, tokens, draw(st.sampled_from(Form)), payload, draw(st.booleans()), owner)


def encoded(wire: Wire, block: Block) -> Bytes:
    head, payload = wire.encode(block)
    return np.frombuffer(head + payload.tobytes(), np.uint8)


@pytest.mark.parametrize("wire", WIRES.values(), ids=WIRES)
@given(block=any_block())
def test_every_block_comes_back(wire: Wire, block: Block) -> None:
    assert same(wire.decode(encoded(wire, block)), block)


@pytest.mark.parametrize("wire", WIRES.values(), ids=WIRES)
@given(data=st.binary(max_size=1000))
def test_any_bytes_are_refused(wire: Wire, data: bytes) -> None:
    with pytest.raises(BadBlock):
        wire.decode(np.frombuffer(data, np.uint8))


@pytest.mark.parametrize("wire", WIRES.values(), ids=WIRES)
@given(block=any_block(), position=st.integers(0), bit=st.integers(0, 7))
@settings(max_examples=200)
def test_any_flipped_bit_is_noticed(wire: Wire, block: Block, position: int, bit: int) -> None:
    data = encoded(wire, block).copy()
    data[position % data.nbytes] ^= 1 << bit
    with pytest.raises(BadBlock):
        wire.decode(data)


class Mutator:
    """Valid blocks, changed in ways that a disk, a bug or an enemy may change them."""

    def __init__(self, wire: Wire, seed: int) -> None:
        self._rng = random.Random(seed)
        tokens = conversation(seed, 300)
        self.originals = [*blocks(tokens, 200), block_at(path(tokens)[0], tokens, 0, form=Form.Q4_0, whole=True)]
        self._encoded = [encoded(wire, block).tobytes() for block in self.originals]

    def next(self) -> bytes:
        rng = self._rng
        data = bytearray(rng.choice(self._encoded))
        kind = rng.randrange(8)
        if kind == 0:
            return rng.randbytes(rng.randrange(600))
        if kind == 1:
            return bytes(data[: rng.randrange(len(data))])
        if kind == 2:
            return bytes(data) + rng.randbytes(rng.randrange(1, 100))
        if kind == 3:
            other = rng.choice(self._encoded)
            cut = rng.randrange(min(len(data), len(other)))
            data = bytearray(data[:cut] + other[cut:])
        elif kind == 4:
            start = rng.randrange(len(data))
            data[start : start + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(64))
        else:
            for _ in range(rng.randrange(1, 4)):
                field = rng.choice((0, 8, 10, 11, 12, 16, 20, 24, 32, 64, 96, 112, 128, 144, len(data) - 8))
                offset = min(len(data) - 1, field + rng.randrange(8))
                data[offset] = rng.choice((0, 1, 2, 63, 64, 65, 127, 128, 255, rng.randrange(256)))
        if len(data) > HEADER_BYTES and rng.random() < 0.7:  # somebody who can compute a checksum
            data[CHECKED_BYTES:HEADER_BYTES] = xxhash.xxh3_128_digest(data[:CHECKED_BYTES] + data[HEADER_BYTES:])
        return bytes(data)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("wire", WIRES.values(), ids=WIRES)
def test_changed_blocks_are_refused_or_consistent(wire: Wire) -> None:
    mutator = Mutator(wire, seed=7)
    known = {(block.address, block.form, block.whole, block.payload.tobytes()) for block in mutator.originals}
    accepted = refused = 0
    for _ in range(N_INPUTS // len(WIRES)):
        try:
            block = wire.decode(np.frombuffer(mutator.next(), np.uint8))
        except BadBlock:
            refused += 1
            continue
        accepted += 1
        assert child_key(block.address.parent, block.tokens) == block.address.key
        assert len(block.tokens) == block.address.p1 - block.address.p0
        if isinstance(wire, SealedWire):
            assert (block.address, block.form, block.whole, block.payload.tobytes()) in known, "it was forged"
    assert refused > N_INPUTS // len(WIRES) // 2
    assert accepted > 0
