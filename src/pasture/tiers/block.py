"""A block: what every tier holds. Frozen; any thread.

Its wire format, for files and networks, is `pasture.tiers.wire`'s business.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from pasture.core.storage import BlockKey, Bytes
from pasture.core.values import Form
from pasture.tiers.keys import Address


@dataclass(frozen=True, slots=True)
class Block:
    """The KV of `tokens` at the positions of its address; `whole` blocks are checkpoints of all positions before `p1`."""

    address: Address
    tokens: array[int]
    """exactly `[p0, p1)`; never appended to"""
    form: Form
    payload: Bytes
    """what `SlabCodec.pack` or `squeeze` gave, or (LOSSLESS) a tier's compression of it"""
    whole: bool = False
    owner: BlockKey | None = None
    """the root of its chain: whose account it is on, which nothing but accounts goes by; None: on nobody's"""

    @property
    def n_bytes(self) -> int:
        return self.payload.nbytes
