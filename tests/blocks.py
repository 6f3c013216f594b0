"""Blocks whose every byte follows from their tokens, so that whoever reads one back can tell whether it is the right one."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence

import numpy as np

from pasture.core.storage import BlockKey, Bytes
from pasture.core.values import Form, Namespace
from pasture.tiers.block import Block
from pasture.tiers.keys import Address, chain, root_key
from pasture.tiers.ports import SlowTier

FINGERPRINT = b"a model"


def root(namespace: str = "default") -> BlockKey:
    return root_key(FINGERPRINT, Namespace(namespace))


def conversation(seed: int, n_tokens: int) -> array[int]:
    """Some tokens; the same for the same seed."""
    rng = random.Random(seed)
    return array("i", (rng.randrange(50_000) for _ in range(n_tokens)))


def path(tokens: array[int], namespace: str = "default") -> list[Address]:
    return list(chain(root(namespace), tokens))


def payload_of(address: Address, n_bytes: int) -> Bytes:
    """Noise that only this address has."""
    return np.random.default_rng(list(address.key)).integers(0, 256, n_bytes, np.uint8)


def block_at(
    address: Address,
    tokens: array[int],
    n_bytes: int = 1000,
    *,
    form: Form = Form.RAW,
    whole: bool = False,
    owner: BlockKey | None = None,
) -> Block:
    """The block of `address` in the conversation `tokens`."""
    return Block(address, tokens[address.p0 : address.p1], form, payload_of(address, n_bytes), whole, owner)


def blocks(tokens: array[int], n_bytes: int = 1000, namespace: str = "default") -> Iterator[Block]:
    for address in path(tokens, namespace):
        yield block_at(address, tokens, n_bytes, owner=root(namespace))


def leading(tier: SlowTier, path: Sequence[Address]) -> int:
    """How many blocks of the path the tier has, from the first."""
    return next((n for n, there in enumerate(tier.stored(path)) if not there), len(path))


def same(found: Block | None, expected: Block) -> bool:
    return (
        found is not None
        and found.address == expected.address
        and found.tokens == expected.tokens
        and found.form is expected.form
        and found.whole is expected.whole
        and found.owner == expected.owner
        and np.array_equal(found.payload, expected.payload)
    )
