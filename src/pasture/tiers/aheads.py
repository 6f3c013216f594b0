"""The account of blocks that came into RAM before anybody asked for them: which are unused yet, what became of the others.

Belongs to the RAM tier and changes under its lock. Every byte that was issued is unused, used or wasted.
"""

from __future__ import annotations

from collections.abc import Iterable

from pasture.core.storage import BlockKey
from pasture.tiers.entries import Entry


class Aheads:
    def __init__(self) -> None:
        self._unused: dict[BlockKey, int] = {}
        """block -> its bytes when it came"""
        self.issued_blocks = 0
        self.unused_bytes = 0
        """here, and not asked for yet"""
        self.used_bytes = 0
        self.wasted_bytes = 0
        """left unused"""
        self.used_blocks = 0

    @property
    def issued_bytes(self) -> int:
        return self.unused_bytes + self.used_bytes + self.wasted_bytes

    def __contains__(self, key: BlockKey) -> bool:
        """Whether the block came ahead and nobody has used it yet."""
        return key in self._unused

    def issue(self, entry: Entry) -> None:
        self._unused[entry.block.address.key] = entry.size
        self.issued_blocks += 1
        self.unused_bytes += entry.size

    def use(self, keys: Iterable[BlockKey]) -> None:
        """These were read by somebody who asked."""
        if self._unused:
            before = len(self._unused)
            n_bytes = sum(self._unused.pop(key, 0) for key in keys)
            self.used_blocks += before - len(self._unused)
            self.unused_bytes -= n_bytes
            self.used_bytes += n_bytes

    def leave(self, key: BlockKey) -> None:
        """It is gone from RAM."""
        n_bytes = self._unused.pop(key, 0)
        self.unused_bytes -= n_bytes
        self.wasted_bytes += n_bytes
