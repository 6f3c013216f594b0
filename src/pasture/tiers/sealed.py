"""Encryption at rest: a `Wire` that keeps keys, tokens and payload of every block secret, and notices any change to them.

AES-256-GCM from the `cryptography` package, with a random nonce for each of a block's two sections; the clear header is
authenticated with both. The tokens section holds the block's real keys as well, because a key can be guessed from likely
tokens: what blocks are filed under is a keyed hash of their key, so that names tell nothing to who lacks the secret. The
header does tell sizes, positions, and which block follows which. Blocks written under another secret, or under none, are
never found, because their names differ. Stateless after construction; any thread.
"""

from __future__ import annotations

import os
import re
import stat
from array import array
from hashlib import blake2b
from pathlib import Path

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pasture.core.errors import ConfigError
from pasture.core.storage import BlockKey, Bytes
from pasture.tiers.block import Block
from pasture.tiers.keys import KEY_BYTES, Address
from pasture.tiers.wire import (
    NOBODY,
    SEAL_BYTES,
    SEALED_KEYS_BYTES,
    BadBlock,
    Header,
    frame,
    header_of,
    identified,
    owner_in,
    parts,
    token_bytes,
)

SECRET_BYTES = 32
_NONCE_BYTES = 12
_TOKENS, _PAYLOAD = b"tokens", b"payload"


class SealedWire:
    """A wire under one secret of 32 bytes, from which one key to encrypt and one to hash names are derived."""

    def __init__(self, secret: bytes) -> None:
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"a secret has {SECRET_BYTES} bytes, not {len(secret)}")
        self._cipher = AESGCM(blake2b(key=secret, person=b"pasture seal", digest_size=32).digest())
        self._name_key = blake2b(key=secret, person=b"pasture name", digest_size=32).digest()

    def name(self, key: BlockKey) -> bytes:
        return blake2b(key, key=self._name_key, digest_size=KEY_BYTES).digest()

    def encode(self, block: Block) -> tuple[bytes, Bytes]:
        address = block.address
        secret_section = address.key + address.parent + (block.owner or NOBODY) + token_bytes(block.tokens)
        header = header_of(
            block,
            self.name,
            sealed=True,
            n_token_bytes=len(secret_section) + SEAL_BYTES,
            n_payload_bytes=block.payload.nbytes + SEAL_BYTES,
        )
        clear = header.pack()
        section = self._seal(memoryview(secret_section), clear + _TOKENS)
        payload = np.frombuffer(self._seal(block.payload.data, clear + _PAYLOAD), np.uint8)
        return frame(header, section, payload), payload

    def decode(self, data: Bytes) -> Block:
        header, section, payload = parts(data)
        address, owner, tokens = self._identify(header, section)
        opened = self._open(payload.data, header.pack() + _PAYLOAD)
        return Block(address, tokens, header.form, np.frombuffer(opened, np.uint8), header.whole, owner)

    def identify(self, header: Header, section: bytes) -> tuple[Address, array[int]]:
        address, _, tokens = self._identify(header, section)
        return address, tokens

    def _identify(self, header: Header, section: bytes) -> tuple[Address, BlockKey | None, array[int]]:
        if not header.sealed:
            raise BadBlock("it is not encrypted")
        opened = self._open(memoryview(section), header.pack() + _TOKENS)
        key, parent, owner = (opened[start : start + KEY_BYTES] for start in range(0, SEALED_KEYS_BYTES, KEY_BYTES))
        if self.name(BlockKey(key)) != header.name or self.name(BlockKey(parent)) != header.parent:
            raise BadBlock("its name is not that of its key")
        address, tokens = identified(header, BlockKey(key), BlockKey(parent), opened[SEALED_KEYS_BYTES:])
        return address, owner_in(owner), tokens

    def _seal(self, section: memoryview, clear: bytes) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, section, clear)

    def _open(self, section: memoryview, clear: bytes) -> bytes:
        try:
            return self._cipher.decrypt(section[:_NONCE_BYTES].tobytes(), section[_NONCE_BYTES:], clear)
        except (InvalidTag, ValueError):
            raise BadBlock("it was encrypted under another secret, or changed") from None


def read_secret(file: Path) -> bytes:
    """The secret in a key file: 32 bytes as they are, or as 64 hexadecimal digits. Raises ConfigError."""
    try:
        facts = file.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise ConfigError(f"kv_key_file: {file} is not a file")
        with file.open("rb") as stream:
            content = stream.read(4 * SECRET_BYTES)
    except OSError as error:
        raise ConfigError(f"kv_key_file: {file} cannot be read: {error.strerror or error}") from None
    if hasattr(os, "geteuid") and facts.st_mode & 0o077:
        raise ConfigError(f"kv_key_file: {file} is open to others: chmod 600 {file}")
    if len(content) == SECRET_BYTES:
        return content
    text = content.strip()
    if re.fullmatch(rb"[0-9A-Fa-f]{64}", text):
        return bytes.fromhex(text.decode())
    raise ConfigError(
        f"kv_key_file: {file} must hold 32 random bytes, or 64 hexadecimal digits: write one with openssl rand -hex 32"
    )
