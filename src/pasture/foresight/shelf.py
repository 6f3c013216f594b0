"""The disk of a simulation: which blocks it has, the longest unused leaves first to go. A `SlowTier` without files.

A use of a path moves its blocks to the warm end from the last to the first, so a parent is always warmer than what hangs from
it, and whatever is coldest is a leaf. Knows no clock; the one thread of a replay.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

from pasture.core.storage import BlockKey, TierStatistics
from pasture.tiers.block import Block
from pasture.tiers.keys import Address


class Shelf:
    name = "disk"
    batch_bytes = 0
    accepts = True

    def __init__(self, capacity_blocks: int) -> None:
        self._capacity = capacity_blocks
        self._blocks: OrderedDict[BlockKey, Block] = OrderedDict()
        """coldest first"""
        self.written_blocks = 0
        self.evicted_blocks = 0

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._blocks

    def use(self, path: Sequence[BlockKey]) -> None:
        """A request came through these, root first; what is not here is passed over."""
        blocks = self._blocks
        for key in reversed(path):
            if key in blocks:
                blocks.move_to_end(key)

    def block(self, key: BlockKey) -> Block:
        """One that is here."""
        return self._blocks[key]

    def put(self, block: Block) -> bool:
        if block.address.key not in self._blocks:
            self._blocks[block.address.key] = block
            self.written_blocks += 1
        return True

    def trim(self) -> None:
        """Down to the capacity."""
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)
            self.evicted_blocks += 1

    # What a prefetcher asks

    def stored(self, path: Sequence[Address], before: Sequence[Address] = (), *, use: bool = True) -> Sequence[bool]:
        return [address.key in self._blocks for address in path]

    def following(self, parents: Sequence[BlockKey]) -> Sequence[Sequence[tuple[Address, array[int]]]]:
        return [() for _ in parents]

    def get_batch(self, addresses: Sequence[Address], timeout_seconds: float) -> Sequence[Block | None]:
        return [self._blocks.get(address.key) for address in addresses]

    def remove(self, key: BlockKey) -> None:
        self._blocks.pop(key, None)

    def statistics(self) -> TierStatistics:
        blocks, written = len(self._blocks), self.written_blocks
        return TierStatistics(self.name, blocks, 0, 0, 0, 0, {}, 0, 0, written, 0, self.evicted_blocks, 0, 0, 0.0, 0.0)

    def close(self) -> None: ...
