"""Which blocks in RAM the slow tiers lack: one line a writer, in the order in which the blocks came, parents first.

A line consists of entries that RAM has anyway, so it costs no memory and needs no limit; whoever leaves RAM leaves every line.
Blocks that RAM refused pass by: they are kept here until each writer has taken them, and their bytes are counted. A longer
block that took shorter ones' place says which they were, once to each writer. What a tier did not take stands aside until the
writer asks for it again, so that it holds up nobody behind it. Belongs to the RAM tier; its lock is held, so nothing here
takes longer for a longer line.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
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
    refusals: int = 0
    """times that the tier did not take it"""


class _Line:
    """Ordered dicts, since taking one after the other from the front of a plain one takes ever longer."""

    def __init__(self) -> None:
        self.passing: OrderedDict[BlockKey, Block] = OrderedDict()
        self.again: OrderedDict[BlockKey, Entry] = OrderedDict()
        """refused before, and asked for again"""
        self.entries: OrderedDict[BlockKey, Entry] = OrderedDict()
        self.aside: OrderedDict[BlockKey, Entry] = OrderedDict()
        """refused, and not asked for again yet"""
        self.refusals: dict[BlockKey, int] = {}
        self.supersedes: dict[BlockKey, list[BlockKey]] = {}

    def __len__(self) -> int:
        return len(self.passing) + len(self.again) + len(self.entries) + len(self.aside)

    def lacks(self, key: BlockKey) -> bool:
        """Whether a block in RAM stands in it."""
        return key in self.entries or key in self.again or key in self.aside

    def leave(self, key: BlockKey) -> None:
        for part in (self.again, self.entries, self.aside):
            part.pop(key, None)
        self.refusals.pop(key, None)
        self.supersedes.pop(key, None)


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
            line.leave(entry.block.address.key)

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
        return any(line.lacks(entry.block.address.key) for line in self._lines)

    def pass_on(self, entry: Entry) -> None:
        """A block is about to leave RAM: the writers that have not taken it yet keep it."""
        key = entry.block.address.key
        lines = [line for line in self._lines if line.lacks(key)]
        for line in lines:
            line.passing[key] = entry.block
        if lines:
            self._passing[key] = len(lines)
            self.passing_bytes += entry.size

    def next(self, writer: int) -> Unwritten | None:
        """Take a block off this writer's line: the oldest of those that pass by, whose room is wanted, else the oldest."""
        line = self._lines[writer]
        if line.passing:
            key, block = line.passing.popitem(last=False)
            self._passing[key] -= 1
            if not self._passing[key]:
                del self._passing[key]
                self.passing_bytes -= size_of(block)
            return Unwritten(block, ())
        part = line.again or line.entries
        if not part:
            return None
        key, entry = part.popitem(last=False)
        return Unwritten(entry.block, tuple(line.supersedes.pop(key, ())), line.refusals.pop(key, 0))

    def put_back(self, writer: int, item: Unwritten, entry: Entry | None) -> None:
        """The tier did not take what `next` gave; `entry` is the block's in RAM, None where it has none any more."""
        line, key = self._lines[writer], item.block.address.key
        if entry is not None:
            if not line.lacks(key):  # else it left and came again meanwhile
                line.aside[key] = entry
            line.refusals[key] = item.refusals + 1
            line.supersedes[key] = [*item.supersedes, *line.supersedes.get(key, ())]

    def offer_again(self, writer: int) -> bool:
        """What stands aside is next; False while there is something left of the last time."""
        line = self._lines[writer]
        if line.again:
            return False
        line.again, line.aside = line.aside, line.again
        return True

    def check(self, entries: dict[BlockKey, Entry]) -> bool:
        """Whether the books add up."""
        passing = {key: block for line in self._lines for key, block in line.passing.items()}
        return (
            all(
                entries.get(key) is entry
                for line in self._lines
                for part in (line.again, line.entries, line.aside)
                for key, entry in part.items()
            )
            and Counter(key for line in self._lines for key in line.passing) == self._passing
            and sum(map(size_of, passing.values())) == self.passing_bytes
        )
