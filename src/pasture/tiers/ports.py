"""What stands behind RAM: a tier that takes its time. Disk today, a remote store with the same five methods."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Protocol

from pasture.core.storage import BlockKey, TierStatistics
from pasture.tiers.block import Block
from pasture.tiers.keys import Address


class SlowTier(Protocol):
    """Called from background threads only, several at once. No method raises: what goes wrong is a miss, with one warning."""

    @property
    def name(self) -> str: ...

    def leading(self, path: Sequence[Address]) -> int:
        """How many of these addresses, from the first, are stored: one batched question."""
        ...

    def following(self, parent: BlockKey) -> Sequence[tuple[Address, array[int]]]:
        """Blocks and checkpoints stored right behind `parent`, with their tokens; a few at most, last used first."""
        ...

    def get(self, address: Address) -> Block | None:
        """The block, verified: header, lengths, checksum, address. None when it is not there or is not what it claims."""
        ...

    def put(self, block: Block) -> None:
        """Store it durably; replaces nothing (equal keys hold equal content), evicts others where the budget needs it."""
        ...

    def remove(self, key: BlockKey) -> None: ...

    def statistics(self) -> TierStatistics: ...

    def close(self) -> None: ...
