"""What a replica tells its routers of the blocks it holds: numbered changes within one start, a snapshot on demand.

    RAM tier (any thread, under its lock)   stored, removed   ──┐
    live cache (looked at now and then)     live              ──┴──►  next_delta: numbers 1, 2, ...  ──► every router

A block counts once, whether it is live, in RAM, or both. The RAM tier's eviction policy is watched (`tiers.watching`), so
nothing has to be asked of the tier. One short lock; the numbers are the event loop's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from pasture.cluster.values import Delta, Epoch, Load, ReplicaId, Snapshot
from pasture.core.storage import BlockKey


class Journal:
    """One start of one replica."""

    def __init__(self, replica: ReplicaId, epoch: Epoch) -> None:
        self.replica = replica
        self.epoch = epoch
        self._lock = threading.Lock()
        self._ram: set[BlockKey] = set()
        self._live: frozenset[BlockKey] = frozenset()
        self._told: set[BlockKey] = set()
        self._touched: set[BlockKey] = set()
        self._number = 0

    def stored(self, key: BlockKey) -> None:
        """RAM has it. Any thread."""
        with self._lock:
            self._ram.add(key)
            self._touched.add(key)

    def removed(self, key: BlockKey) -> None:
        """RAM does not have it any more. Any thread."""
        with self._lock:
            self._ram.discard(key)
            self._touched.add(key)

    def live(self, keys: Iterable[BlockKey]) -> None:
        """All that is in the live cache now."""
        found = frozenset(keys)
        with self._lock:
            self._touched |= found ^ self._live
            self._live = found

    def next_delta(self, load: Load) -> Delta:
        """What has changed since the last one, which every router must get."""
        with self._lock:
            touched, self._touched = self._touched, set()
            there = {key for key in touched if key in self._ram or key in self._live}
            stored = tuple(there - self._told)
            removed = tuple((touched - there) & self._told)
        self._told.update(stored)
        self._told.difference_update(removed)
        self._number += 1
        return Delta(self.replica, self.epoch, self._number, stored, removed, load)

    def snapshot(self, load: Load) -> Snapshot:
        """What was told so far, for a router that begins, or has missed something."""
        return Snapshot(self.replica, self.epoch, self._number, tuple(self._told), load)
