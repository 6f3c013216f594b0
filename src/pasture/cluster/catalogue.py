"""Which blocks each replica is known to hold: the sum of its events, and nothing it may have lost.

    event's epoch older than known      dropped
    event's epoch newer                 everything known of the replica is forgotten; then as below, from number 0
    number = last + 1                   applied
    number <= last                      dropped: seen already
    number >  last + 1                  a gap: everything is forgotten and a snapshot asked for, until one comes

So what is credited to a replica is exactly what it held after the last number that arrived without a gap, or nothing. Who holds
a key is one integer, a bit a holder, so a path is walked once for all of them. Pure; one thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pasture.cluster.values import Delta, Epoch, ReplicaId, Snapshot, SnapshotRequest
from pasture.core.storage import BlockKey


@dataclass(slots=True)
class _Holder:
    bit: int
    """its own, among those of all holders"""
    epoch: Epoch
    blocks: set[BlockKey] = field(default_factory=set)
    number: int = 0
    """the last that was applied"""
    complete: bool = True
    """False from a gap to the next snapshot"""


class Catalogue:
    """Empty at first; holders are added and dropped by the router."""

    def __init__(self) -> None:
        self._holders: dict[ReplicaId, _Holder] = {}
        self._where: dict[BlockKey, int] = {}
        """the bits of those who hold it"""
        self._everybody = 0
        self.gaps = 0
        self.stale = 0

    def __len__(self) -> int:
        """Different keys, wherever they are."""
        return len(self._where)

    def __contains__(self, replica: ReplicaId) -> bool:
        return replica in self._holders

    def epoch(self, replica: ReplicaId) -> Epoch | None:
        holder = self._holders.get(replica)
        return None if holder is None else holder.epoch

    def credited(self, replica: ReplicaId) -> int:
        """How many keys a holder is known to hold; 0 for a stranger."""
        holder = self._holders.get(replica)
        return 0 if holder is None else len(holder.blocks)

    def begin(self, replica: ReplicaId, epoch: Epoch) -> bool:
        """A holder in this epoch, with nothing where it is new. False, and no change, where a later one is known."""
        holder = self._holders.get(replica)
        if holder is None:
            taken = {other.bit for other in self._holders.values()}
            bit = next(bit for n in range(len(taken) + 1) if (bit := 1 << n) not in taken)
            self._holders[replica] = _Holder(bit, epoch)
            self._everybody |= bit
            return True
        if epoch < holder.epoch:
            return False
        if epoch > holder.epoch:
            self._forget(holder)
            holder.epoch, holder.number, holder.complete = epoch, 0, True
        return True

    def drop(self, replica: ReplicaId) -> None:
        """It is gone, with whatever it held; nothing happens when it is unknown."""
        holder = self._holders.pop(replica, None)
        if holder is not None:
            self._forget(holder)
            self._everybody &= ~holder.bit

    def apply(self, event: Delta | Snapshot) -> SnapshotRequest | None:
        """Learn from an event of a known holder; says, as long as it is so, that a snapshot is wanted.

        Raises KeyError for a holder that is not known.
        """
        holder = self._holders[event.replica]
        if not self.begin(event.replica, event.epoch):
            self.stale += 1
            return None
        if isinstance(event, Snapshot):
            self._replace(holder, event)
        elif holder.complete and event.number == holder.number + 1:
            holder.number = event.number
            self._store(holder, event.stored)
            self._remove(holder, event.removed)
        elif event.number <= holder.number:
            self.stale += 1
        else:
            self.gaps += holder.complete
            self._forget(holder)
            holder.complete = False
            return SnapshotRequest(event.replica, event.epoch)
        return None

    def leading(self, path: Sequence[BlockKey]) -> Mapping[ReplicaId, int]:
        """How many of these blocks, from the first, each holder has; who has none is left out."""
        found: dict[int, int] = {}
        still = self._everybody
        for index, key in enumerate(path):
            here = self._where.get(key, 0) & still
            if here != still:
                found.update((bit, index) for bit in _bits(still & ~here))
                still = here
                if not still:
                    break
        found.update((bit, len(path)) for bit in _bits(still))
        return {replica: found[holder.bit] for replica, holder in self._holders.items() if found[holder.bit]}

    def holds(self, replica: ReplicaId, key: BlockKey) -> bool:
        holder = self._holders.get(replica)
        return holder is not None and key in holder.blocks

    def _replace(self, holder: _Holder, snapshot: Snapshot) -> None:
        if snapshot.number < holder.number:
            self.stale += 1
            return
        self._forget(holder)
        holder.number, holder.complete = snapshot.number, True
        self._store(holder, snapshot.blocks)

    def _store(self, holder: _Holder, keys: Iterable[BlockKey]) -> None:
        where, bit = self._where, holder.bit
        for key in keys:
            where[key] = where.get(key, 0) | bit
            holder.blocks.add(key)

    def _remove(self, holder: _Holder, keys: Iterable[BlockKey]) -> None:
        for key in keys:
            if key in holder.blocks:
                holder.blocks.discard(key)
                left = self._where[key] & ~holder.bit
                if left:
                    self._where[key] = left
                else:
                    del self._where[key]

    def _forget(self, holder: _Holder) -> None:
        self._remove(holder, tuple(holder.blocks))


def _bits(mask: int) -> Iterator[int]:
    while mask:
        bit = mask & -mask
        yield bit
        mask ^= bit
