"""What RAM keeps of a block beside the block, and a heap whose order may be out of date.

An entry belongs to the memory tier and changes only under its lock. The heap serves eviction and compression: both want "the
least" of tens of thousands of entries, whose keys rise with every use. It keeps the key an item was pushed with and looks again
when the item comes up, so a use costs nothing and a pop O(log n). Exact for keys that only ever rise, and for those that fall
where the item is pushed again when they do.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Generic, TypeVar

import numpy as np

from pasture.tiers.block import Block

T = TypeVar("T")
SortKey = tuple[float, ...]

_FIRST_SWEEP = 1024
_NO_BYTES = np.empty(0, np.uint8)

BLOCK_OVERHEAD_BYTES = 1536
"""counted for every block beside its payload: tokens, keys, index and heap entries, Python's own headers"""


class Entry:
    """A block in RAM and its standing."""

    __slots__ = ("block", "came", "doomed", "forks", "gone", "last_used", "owner", "pins", "size", "stage")

    def __init__(self, block: Block) -> None:
        self.block = block
        self.owner = block.owner
        """whose account it is on, from beginning to end"""
        self.size = size_of(block)
        """what it costs in RAM"""
        self.last_used = 0
        """tick of the last use; 0: nobody has asked for it yet"""
        self.came = 0
        """tick at which it came"""
        self.forks = 0
        """how often a second path began somewhere below: many for a system prompt"""
        self.pins = 0
        self.stage = 0
        """how many steps of the compression ladder were tried"""
        self.doomed = False
        """superseded while pinned: goes when it is unpinned"""
        self.gone = False

    def put(self, block: Block) -> None:
        """Another form of the same block."""
        self.block = block
        self.size = size_of(block)

    def empty(self) -> Block:
        """Let go of the block, which a heap or a pin would otherwise keep alive; returns it."""
        block, self.gone = self.block, True
        if block.payload.nbytes:  # else there is nothing to let go of
            self.block = Block(block.address, block.tokens, block.form, _NO_BYTES, block.whole, block.owner)
        return block


def size_of(block: Block) -> int:
    """What the block costs in RAM."""
    return block.n_bytes + BLOCK_OVERHEAD_BYTES


class LazyHeap(Generic[T]):
    """Items by keys that rise, each at most once. `wanted` is asked when an item comes up; who is not, falls out."""

    def __init__(self, key: Callable[[T], SortKey], wanted: Callable[[T], bool]) -> None:
        self._key = key
        self._wanted = wanted
        self._heap: list[tuple[SortKey, int, T]] = []
        self._keys: dict[int, SortKey] = {}
        """id of an item that is in -> the key that counts; the heap may hold others of it, from before its key fell"""
        self._turn = count()
        self._sweep_at = _FIRST_SWEEP

    def push(self, item: T) -> None:
        """Does nothing for an item that is in already, unless its key is less now."""
        key, known = self._key(item), self._keys.get(id(item))
        if known is None or key < known:
            self._keys[id(item)] = key
            heapq.heappush(self._heap, (key, next(self._turn), item))
            if len(self._heap) >= self._sweep_at:
                self._sweep()

    def pop(self) -> T | None:
        """Take out the least item that is wanted; None when there is none."""
        while self._heap:
            key, _, item = self._heap[0]
            if self._keys.get(id(item)) != key:
                heapq.heappop(self._heap)
                continue
            if not self._wanted(item):
                heapq.heappop(self._heap)
                del self._keys[id(item)]
                continue
            now = self._key(item)
            if now > key:
                self._keys[id(item)] = now
                heapq.heapreplace(self._heap, (now, next(self._turn), item))
                continue
            heapq.heappop(self._heap)
            del self._keys[id(item)]
            return item
        return None

    def _sweep(self) -> None:
        """Forget whom nobody wants, so that they do not pile up where nothing is ever popped."""
        self._heap = [row for row in self._heap if self._keys.get(id(row[2])) == row[0] and self._wanted(row[2])]
        heapq.heapify(self._heap)
        self._keys = {id(item): key for key, _, item in self._heap}
        self._sweep_at = max(_FIRST_SWEEP, 2 * len(self._heap))
