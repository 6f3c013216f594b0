"""A consistent-hash ring: which replicas a key belongs to, in order, and no more than its share moves when one comes or goes.

Every replica has the same number of points on a circle of 64 bits; a key belongs to the owner of the next point, after that to
the next other owner, and so on. A replica's points depend on nothing but its name, so who joins only takes keys and who leaves
only gives some: about 1/N of them. That some can do more than others is the load bound's business (`router.py`). Pure; one
thread. Source: Karger et al., Consistent Hashing and Random Trees (1997).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import chain

from pasture.cluster.values import ReplicaId

POINTS = 200
"""of a replica; shares then differ by about 7 % (one over its root)"""
_PLACE_BYTES = 8


class Ring:
    """Empty at first."""

    def __init__(self, points: int = POINTS) -> None:
        self._points = points
        self._members: set[ReplicaId] = set()
        self._places: list[int] = []
        self._owners: list[ReplicaId] = []

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, replica: ReplicaId) -> bool:
        return replica in self._members

    def members(self) -> frozenset[ReplicaId]:
        return frozenset(self._members)

    def set_members(self, members: Iterable[ReplicaId]) -> None:
        """From now on it consists of these."""
        wanted = set(members)
        if wanted != self._members:
            self._members = wanted
            points = sorted((_place(f"{name}#{n}".encode()), name) for name in wanted for n in range(self._points))
            self._places = [place for place, _ in points]
            self._owners = [name for _, name in points]

    def owner(self, key: bytes) -> ReplicaId | None:
        """Who comes first; None when the ring is empty."""
        return next(self.order(key), None)

    def order(self, key: bytes) -> Iterator[ReplicaId]:
        """Everybody, each once, from the key's place onwards."""
        start = bisect_right(self._places, _place(key))
        seen: set[ReplicaId] = set()
        for index in chain(range(start, len(self._owners)), range(start)):
            owner = self._owners[index]
            if owner not in seen:
                seen.add(owner)
                yield owner
                if len(seen) == len(self._members):
                    return


def _place(key: bytes) -> int:
    return int.from_bytes(blake2b(key, digest_size=_PLACE_BYTES).digest(), "big")
