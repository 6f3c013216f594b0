"""Who goes first: the port between a tier and its eviction policy, and the plain policies.

A tier tells its policy what happens (a request arrived, blocks entered, were used, became leaves) and asks it for a victim.
Only leaves that nobody pins ever go, so whatever the policy, the head of a prefix outlives what hangs from it. A policy belongs
to one tier, which makes it and calls it under its lock. `pasture.foresight` holds policies that learn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from pasture.core.storage import BlockKey
from pasture.core.values import Kind
from pasture.tiers.entries import Entry, LazyHeap, SortKey

Wanted = Callable[[Entry], bool]
"""whether an entry that was offered can still go"""


class EvictionPolicy(Protocol):
    """Called under its tier's lock."""

    def arrived(self, path: Sequence[BlockKey]) -> None:
        """A request over these blocks, stored or not, begins. Comes before whatever it does to the tier."""
        ...

    def finished(self, path: Sequence[BlockKey], kind: Kind) -> None:
        """A request over these blocks, its reply's included, has ended; `kind` is what is expected next."""
        ...

    def entered(self, entry: Entry) -> None:
        """A block is new here."""
        ...

    def removed(self, entry: Entry) -> None:
        """A block is gone: evicted, or for another reason."""
        ...

    def used(self, entries: Sequence[Entry]) -> None:
        """These were read. Everything before them counts as used too, but is not named."""
        ...

    def offered(self, entry: Entry) -> None:
        """It can go: it is a leaf now, or again. May be said several times."""
        ...

    def victim(self) -> Entry | None:
        """Take out who goes first of those that were offered and still can; None when there is nobody."""
        ...

    def admits(self, newcomer: Entry, victim: Entry) -> bool:
        """Whether a block that is not here yet is worth more than `victim`; a refused newcomer has not `entered`."""
        ...

    def expects(self, key: BlockKey) -> float:
        """Uses a second that are expected of a block, here or not; 0 from a policy that does not learn."""
        ...


PolicyMaker = Callable[[Wanted], EvictionPolicy]


class Ordered:
    """A sort key as a policy: smallest first, everybody is let in. Exact for keys that only rise."""

    def __init__(self, key: Callable[[Entry], SortKey], wanted: Wanted) -> None:
        self._leaves: LazyHeap[Entry] = LazyHeap(key, wanted)

    def arrived(self, path: Sequence[BlockKey]) -> None: ...
    def finished(self, path: Sequence[BlockKey], kind: Kind) -> None: ...
    def entered(self, entry: Entry) -> None: ...
    def removed(self, entry: Entry) -> None: ...
    def used(self, entries: Sequence[Entry]) -> None: ...

    def offered(self, entry: Entry) -> None:
        self._leaves.push(entry)

    def victim(self) -> Entry | None:
        return self._leaves.pop()

    def admits(self, newcomer: Entry, victim: Entry) -> bool:
        return True

    def expects(self, key: BlockKey) -> float:
        return 0.0


def ordered_by(key: Callable[[Entry], SortKey]) -> PolicyMaker:
    return lambda wanted: Ordered(key, wanted)


def _last_use(entry: Entry) -> SortKey:
    return (entry.last_used,)


least_recently_used: PolicyMaker = ordered_by(_last_use)
