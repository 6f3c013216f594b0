"""Which blocks there are, and how they hang together: the index inside the RAM tier.

    by key         exact blocks of a chain
    by parent      siblings, by their first token: what a prompt that parts midway, or a short end, can use
    children       how many hang from a key, whether or not the block of that key is here

Finds entries and links them; accounts, evicts and locks nothing. `divisible` decides what a walk looks for: blocks that follow
one another, or the longest checkpoint. At most MAX_CANDIDATES siblings are compared, newest first. The tier holds its lock.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, ValuesView
from itertools import islice

from pasture.core.storage import BLOCK_TOKENS, BlockKey
from pasture.tiers.entries import Entry
from pasture.tiers.keys import child_key
from pasture.tiers.trail import Trail, common_prefix

_NOBODY: Iterator[Entry] = iter(())
MAX_CANDIDATES = 32
"""siblings compared token by token, newest first"""


class BlockIndex:
    def __init__(self, *, divisible: bool) -> None:
        self.divisible = divisible
        self.n_children: dict[BlockKey, int] = {}
        self._entries: dict[BlockKey, Entry] = {}
        self._siblings: dict[tuple[BlockKey, int], dict[BlockKey, Entry]] = {}
        """(parent, first token) -> entries, oldest first"""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._entries

    def values(self) -> ValuesView[Entry]:
        return self._entries.values()

    def get(self, key: BlockKey) -> Entry | None:
        return self._entries.get(key)

    def add(self, entry: Entry) -> None:
        """File it; the caller has counted it as a child already."""
        block = entry.block
        self._entries[block.address.key] = entry
        self._siblings.setdefault((block.address.parent, block.tokens[0]), {})[block.address.key] = entry

    def remove(self, entry: Entry) -> Entry | None:
        """Take it out; returns its parent when nothing hangs from that any more."""
        block = entry.block
        del self._entries[block.address.key]
        name = (block.address.parent, block.tokens[0])
        siblings = self._siblings[name]
        del siblings[block.address.key]
        if not siblings:
            del self._siblings[name]
        return self.lose_child(block.address.parent)

    def gain_child(self, parent: BlockKey) -> None:
        """From here on the parent is no leaf."""
        self.n_children[parent] = self.n_children.get(parent, 0) + 1

    def lose_child(self, parent: BlockKey) -> Entry | None:
        """Returns the parent when it has become a leaf."""
        n_children = self.n_children[parent] - 1
        if n_children:
            self.n_children[parent] = n_children
            return None
        del self.n_children[parent]
        return self._entries.get(parent)

    def is_leaf(self, entry: Entry) -> bool:
        """Whether nothing here needs it. A checkpoint is never needed by another."""
        return entry.block.whole or entry.block.address.key not in self.n_children

    def check(self) -> bool:
        """Whether the links add up."""
        children = Counter(entry.block.address.parent for entry in self._entries.values())
        return self.n_children == children and sum(map(len, self._siblings.values())) == len(self._entries)

    # Walks

    def path(self, trail: Trail) -> tuple[list[Entry], int]:
        """The usable entries of the trail, and how many leading tokens they give."""
        if not self.divisible:
            entry = self._longest_whole(trail)
            return ([entry], entry.block.address.p1) if entry is not None else ([], 0)
        path: list[Entry] = []
        for index in range(trail.n_blocks):
            entry = self._exact(trail, index)
            if entry is None:
                part = trail.part(index)
                best = self._best_sibling(trail[index].parent, part)
                if best is None:
                    return path, index * BLOCK_TOKENS
                return [*path, best], index * BLOCK_TOKENS + common_prefix(best.block.tokens, part)
            path.append(entry)
        return path, len(trail)

    def cover(self, trail: Trail, p0: int, p1: int) -> list[Entry] | None:
        if not self.divisible:
            entry = self.whole_at(trail, p1) if p0 == 0 else None
            return [entry] if entry is not None else None
        found = []
        for index in trail.between(p0, p1):
            entry = self._exact(trail, index)
            if entry is None:
                part = trail.part(index)[: p1 - index * BLOCK_TOKENS]
                entry = self._best_sibling(trail[index].parent, part)
                if entry is None or common_prefix(entry.block.tokens, part) < len(part):
                    return None
            found.append(entry)
        return found

    def stored(self, trail: Trail, index: int) -> Entry | None:
        """The block itself, or for a short one a sibling that begins with it."""
        entry = self._exact(trail, index)
        part = trail.part(index)
        if entry is not None or len(part) == BLOCK_TOKENS:
            return entry
        best = self._best_sibling(trail[index].parent, part)
        return best if best is not None and common_prefix(best.block.tokens, part) == len(part) else None

    def behind(self, parent: BlockKey, first_token: int) -> Iterator[Entry]:
        """A few entries behind `parent` that begin with this token, newest first."""
        siblings = self._siblings.get((parent, first_token))
        return islice(reversed(siblings.values()), MAX_CANDIDATES) if siblings else _NOBODY

    def whole_at(self, trail: Trail, p1: int) -> Entry | None:
        """The checkpoint of exactly `[0, p1)`."""
        index = (p1 - 1) // BLOCK_TOKENS
        part = trail.part(index)[: p1 - index * BLOCK_TOKENS]
        entry = self._entries.get(child_key(trail[index].parent, part))
        return entry if entry is not None and entry.block.tokens == part else None

    def _exact(self, trail: Trail, index: int) -> Entry | None:
        entry = self._entries.get(trail[index].key)
        return entry if entry is not None and entry.block.tokens == trail.part(index) else None

    def _best_sibling(self, parent: BlockKey, part: array[int]) -> Entry | None:
        return max(self.behind(parent, part[0]), key=lambda e: common_prefix(e.block.tokens, part), default=None)

    def _longest_whole(self, trail: Trail) -> Entry | None:
        for index in reversed(range(trail.n_blocks)):
            entry = self._exact(trail, index)
            if entry is not None:
                return entry
            part = trail.part(index)
            fitting = (e for e in self.behind(trail[index].parent, part[0]) if e.block.tokens == part[: len(e.block.tokens)])
            best = max(fitting, key=lambda e: e.block.address.p1, default=None)
            if best is not None:
                return best
        return None
