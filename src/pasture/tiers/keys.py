"""Block keys: a hash chain over tokens, rooted in the namespace and the model.

    root = H(fingerprint, namespace)          key of [0, 64) = H(root, tokens)          key of [64, 128) = H(that key, tokens)

A key therefore stands for everything before it too, and a foreign namespace or another model cannot express a hit. Isolation
lives here and nowhere else. Pure functions; any thread. Source of the idea: vLLM's block hashes, LMCache's object keys.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

from pasture.core.storage import BLOCK_TOKENS, BlockKey
from pasture.core.values import Namespace

KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class Address:
    """Where a block is in its chain: `[p0, p1)` of a prefix whose key up to `p0` is `parent`."""

    key: BlockKey
    parent: BlockKey
    p0: int
    p1: int


def root_key(fingerprint: bytes, namespace: Namespace) -> BlockKey:
    """What the first block of every conversation in this namespace on this model hangs from."""
    return BlockKey(blake2b(namespace.encode(), key=blake2b(fingerprint).digest(), digest_size=KEY_BYTES).digest())


def child_key(parent: BlockKey, tokens: array[int]) -> BlockKey:
    """The key of a block of these tokens behind `parent`."""
    return BlockKey(blake2b(tokens.tobytes(), key=parent, digest_size=KEY_BYTES).digest())


def chain(root: BlockKey, tokens: array[int], p0: int = 0) -> Iterator[Address]:
    """The addresses of all blocks of `tokens`, the last perhaps short; lazily, so that a reader may stop at the first miss.

    With `p0` (a multiple of BLOCK_TOKENS), `root` is the key of the block that ends there.
    """
    parent = root
    for start in range(p0, len(tokens), BLOCK_TOKENS):
        part = tokens[start : start + BLOCK_TOKENS]
        key = child_key(parent, part)
        yield Address(key, parent, start, start + len(part))
        parent = key
