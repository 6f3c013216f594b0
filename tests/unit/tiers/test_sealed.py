"""Encryption at rest: nothing of a prompt is in the file, and nobody without the secret finds or changes anything."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from pasture.core.errors import ConfigError
from pasture.core.storage import Bytes
from pasture.tiers.block import Block
from pasture.tiers.disk import DiskTier
from pasture.tiers.sealed import SealedWire, read_secret
from pasture.tiers.wire import HEADER_BYTES, BadBlock, PlainWire, frame, parts
from tests.blocks import block_at, blocks, conversation, leading, path, same

TOKENS = conversation(1, 100)
FULL, SHORT = path(TOKENS)
SECRET = bytes(range(32))


def encoded(wire: SealedWire | PlainWire, block: Block) -> Bytes:
    head, payload = wire.encode(block)
    return np.frombuffer(head + payload.tobytes(), np.uint8).copy()


def test_a_block_comes_back_and_shows_nothing() -> None:
    block = block_at(FULL, TOKENS)
    data = encoded(SealedWire(SECRET), block)
    assert same(SealedWire(SECRET).decode(data), block)
    clear = data.tobytes()
    for secret in (block.payload.tobytes()[:16], block.tokens.tobytes()[:16], block.address.key, block.address.parent):
        assert secret not in clear


def test_the_same_block_looks_different_every_time() -> None:
    block = block_at(FULL, TOKENS)
    one, two = (encoded(SealedWire(SECRET), block)[HEADER_BYTES:] for _ in range(2))
    assert not np.array_equal(one, two)


def test_another_secret_and_none_open_nothing() -> None:
    sealed = encoded(SealedWire(SECRET), block_at(FULL, TOKENS))
    with pytest.raises(BadBlock, match="another secret"):
        SealedWire(b"x" * 32).decode(sealed)
    with pytest.raises(BadBlock, match="no key"):
        PlainWire().decode(sealed)
    with pytest.raises(BadBlock, match="not encrypted"):
        SealedWire(SECRET).decode(encoded(PlainWire(), block_at(FULL, TOKENS)))


def test_a_change_with_a_right_checksum_is_noticed() -> None:
    data = encoded(SealedWire(SECRET), block_at(FULL, TOKENS))
    header, section, payload = parts(data)
    changed = payload.copy()
    changed[40] ^= 1
    for forged in (
        frame(header, section, changed) + changed.tobytes(),
        frame(header, section[:20] + bytes([section[20] ^ 1]) + section[21:], payload) + payload.tobytes(),
    ):
        with pytest.raises(BadBlock, match="changed"):
            SealedWire(SECRET).decode(np.frombuffer(forged, np.uint8))


def test_sections_of_two_blocks_cannot_be_mixed() -> None:
    wire = SealedWire(SECRET)
    one, other = (parts(encoded(wire, block_at(FULL, TOKENS))) for _ in range(2))
    assert wire.decode(np.frombuffer(frame(one[0], other[1], one[2]) + one[2].tobytes(), np.uint8)), "the same block twice"
    strange = parts(encoded(wire, block_at(path(conversation(2, 64))[0], conversation(2, 64))))
    with pytest.raises(BadBlock):
        wire.decode(np.frombuffer(frame(strange[0], one[1], strange[2]) + strange[2].tobytes(), np.uint8))


def test_a_directory_may_hold_what_several_secrets_wrote(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wires = (None, SealedWire(SECRET), SealedWire(b"x" * 32))
    tiers = [DiskTier(tmp_path / "cache", 1 << 20, wire=wire) for wire in wires]
    for number, tier in enumerate(tiers):
        assert leading(tier, path(TOKENS)) == 0, "what others wrote is not found"
        assert tier.get(FULL) is None
        for block in blocks(TOKENS):
            tier.put(block)
        assert tier.statistics().blocks == 2 * (number + 1), "but it counts"
    for tier in tiers:
        assert leading(tier, path(TOKENS)) == 2
        assert [tokens for _, tokens in tier.following([FULL.key])[0]] == [TOKENS[64:]]
        assert all(same(tier.get(block.address), block) for block in blocks(TOKENS))
        assert tier.statistics().damaged_blocks == tier.statistics().errors == 0
        tier.close()
    assert not caplog.records


def test_neither_files_nor_index_hold_tokens(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path / "cache", 1 << 20, wire=SealedWire(SECRET))
    for block in blocks(TOKENS):
        tier.put(block)
    content = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    tier.close()
    assert TOKENS[64:80].tobytes() not in content
    assert bytes(FULL.key) not in content
    assert SHORT.key.hex() not in str(list(tmp_path.rglob("*")))


def key_file(tmp_path: Path, content: bytes, mode: int = 0o600) -> Path:
    file = tmp_path / "key"
    file.write_bytes(content)
    file.chmod(mode)
    return file


@pytest.mark.parametrize("content", [SECRET, SECRET.hex().encode(), SECRET.hex().upper().encode() + b"\n"])
def test_a_key_file_holds_bytes_or_digits(tmp_path: Path, content: bytes) -> None:
    assert read_secret(key_file(tmp_path, content)) == SECRET


@pytest.mark.parametrize("content", [b"", b"short", SECRET + b"x", SECRET.hex().encode() + b"00", b"g" * 64, b"x" * 1000])
def test_a_key_file_with_anything_else_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ConfigError, match="32 random bytes"):
        read_secret(key_file(tmp_path, content))


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no such permissions here")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_key_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match="chmod 600"):
        read_secret(key_file(tmp_path, SECRET, mode))


def test_a_key_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_secret(tmp_path / "missing")
    with pytest.raises(ConfigError, match="not a file"):
        read_secret(tmp_path)
