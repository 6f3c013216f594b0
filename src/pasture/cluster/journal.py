"""What a replica tells its routers of the blocks it holds: numbered changes within one start, a snapshot on demand.

    RAM tier (any thread, under its lock)   stored, removed   ──┐
    live cache (looked at now and then)     live              ──┴──►  next_delta: numbers 1, 2, ...  ──► every router

A block counts once, whether it is live, in RAM, or both. `WatchedPolicy` hears of the RAM tier's blocks as its eviction policy
does, so nothing has to be asked of the tier. One short lock; the numbers are the event loop's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from pasture.cluster.values import Delta, Epoch, Load, ReplicaId, Snapshot
from pasture.core.storage import BlockKey
from pasture.core.values import Kind
from pasture.tiers.entries import Entry
from pasture.tiers.eviction import EvictionPolicy, PolicyMaker, Wanted


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


class WatchedPolicy:
    """Another policy, and a journal that hears what enters and leaves."""

    def __init__(self, policy: EvictionPolicy, journal: Journal) -> None:
        self._policy = policy
        self._journal = journal

    def arrived(self, path: Sequence[BlockKey]) -> None:
        self._policy.arrived(path)

    def finished(self, path: Sequence[BlockKey], kind: Kind) -> None:
        self._policy.finished(path, kind)

    def entered(self, entry: Entry) -> None:
        self._journal.stored(entry.block.address.key)
        self._policy.entered(entry)

    def removed(self, entry: Entry) -> None:
        self._journal.removed(entry.block.address.key)
        self._policy.removed(entry)

    def used(self, entries: Sequence[Entry]) -> None:
        self._policy.used(entries)

    def offered(self, entry: Entry) -> None:
        self._policy.offered(entry)

    def victim(self) -> Entry | None:
        return self._policy.victim()

    def admits(self, newcomer: Entry, victim: Entry) -> bool:
        return self._policy.admits(newcomer, victim)

    def expects(self, key: BlockKey) -> float:
        return self._policy.expects(key)


def watched(make: PolicyMaker, journal: Journal) -> PolicyMaker:
    """The same policies, heard by the journal."""

    def made(wanted: Wanted) -> EvictionPolicy:
        return WatchedPolicy(make(wanted), journal)

    return made
