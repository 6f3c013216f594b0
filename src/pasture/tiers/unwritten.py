"""Which blocks in RAM the slow tiers lack: one line a writer, in the order in which the blocks came, parents first.

A line consists of entries that RAM has anyway, so it costs no memory and needs no limit; whoever leaves RAM leaves every line.
Blocks that RAM refused pass by: they are kept here until each writer has taken them, and their bytes are counted. A longer
block that took shorter ones' place says which they were, once to each writer. Belongs to the RAM tier; its lock is held.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pasture.core.storage import BlockKey
from pasture.tiers.block import Block
from pasture.tiers.entries import Entry, size_of


@dataclass(frozen=True, slots=True)
class Unwritten:
    """A block that a slow tier does not have yet."""

    block: Block
    supersedes: tuple[BlockKey, ...]
    """shorter blocks, of no use once this one is there"""


class _Line:
    def __init__(self) -> None:
        self.entries: dict[BlockKey, Entry] = {}
        self.passing: dict[BlockKey, Block] = {}
        self.supersedes: dict[BlockKey, list[BlockKey]] = {}

    def __len__(self) -> int:
        return len(self.entries) + len(self.passing)


class Lines:
    """`n_writers` of them; 0 where nothing stands behind RAM."""

    def __init__(self, n_writers: int) -> None:
        self._lines = tuple(_Line() for _ in range(n_writers))
        self._passing: Counter[BlockKey] = Counter()
        """how many writers have yet to take a block that passes by"""
        self.passing_bytes = 0

    def __len__(self) -> int:
        """How many writers there are."""
        return len(self._lines)

    def length(self, writer: int) -> int:
        return len(self._lines[writer])

    def entered(self, entry: Entry, source: int | None) -> None:
        """A block is in RAM; every writer lacks it but the one whose tier it came from."""
        for writer, line in enumerate(self._lines):
            if writer != source:
                line.entries[entry.block.address.key] = entry

    def left(self, entry: Entry) -> None:
        """A block is in RAM no longer."""
        for line in self._lines:
            line.entries.pop(entry.block.address.key, None)
            line.supersedes.pop(entry.block.address.key, None)

    def supersede(self, longer: BlockKey, shorter: BlockKey) -> None:
        """`longer` has taken the place of `shorter`, which is about to leave."""
        for line in self._lines:
            line.supersedes.setdefault(longer, []).extend((*line.supersedes.get(shorter, ()), shorter))

    def pass_by(self, block: Block) -> None:
        """Keep a block for the writers alone."""
        key = block.address.key
        if key not in self._passing:
            for line in self._lines:
                line.passing[key] = block
            self._passing[key] = len(self._lines)
            self.passing_bytes += size_of(block)

    def lack(self, entry: Entry) -> bool:
        """Whether a writer has not taken it yet."""
        return any(entry.block.address.key in line.entries for line in self._lines)

    def pass_on(self, entry: Entry) -> None:
        """A block is about to leave RAM: the writers that have not taken it yet keep it."""
        key = entry.block.address.key
        lines = [line for line in self._lines if key in line.entries]
        for line in lines:
            line.passing[key] = entry.block
        if lines:
            self._passing[key] = len(lines)
            self.passing_bytes += entry.size

    def next(self, writer: int) -> Unwritten | None:
        """Take a block off this writer's line: the oldest of those that pass by, whose room is wanted, else the oldest."""
        line = self._lines[writer]
        for key, block in line.passing.items():
            del line.passing[key]
            self._passing[key] -= 1
            if not self._passing[key]:
                del self._passing[key]
                self.passing_bytes -= size_of(block)
            return Unwritten(block, ())
        for key, entry in line.entries.items():
            del line.entries[key]
            return Unwritten(entry.block, tuple(line.supersedes.pop(key, ())))
        return None

    def put_back(self, writer: int, item: Unwritten, entry: Entry | None) -> None:
        """The tier did not take what `next` gave; `entry` is the block's in RAM, None where it has none any more."""
        line, key = self._lines[writer], item.block.address.key
        if entry is not None:
            line.entries = {key: entry, **line.entries}
            line.supersedes[key] = [*item.supersedes, *line.supersedes.get(key, ())]

    def check(self, entries: dict[BlockKey, Entry]) -> bool:
        """Whether the books add up."""
        passing = {key: block for line in self._lines for key, block in line.passing.items()}
        return (
            all(entries.get(key) is entry for line in self._lines for key, entry in line.entries.items())
            and Counter(key for line in self._lines for key in line.passing) == self._passing
            and sum(map(size_of, passing.values())) == self.passing_bytes
        )
