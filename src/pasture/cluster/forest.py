"""The prefix trees of all replicas beside each other, as an ingress shows them.

What two replicas have both computed takes cells on both, so it is a node on each, with the hits and the holders that it has
there. A node's number at an ingress is made of its number at the replica and the mark of that start of the replica: every
ingress finds the node by it without remembering anything, it stays the same while others come and go, and what a restarted
replica counts anew is not taken for what it had before. Pure.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import replace
from hashlib import blake2b

from pasture.cluster.members import Member
from pasture.cluster.values import ReplicaId
from pasture.core.statistics import MAX_PREFIXES, PoolStatistics, PrefixStatistics

_MARKS = 1 << 16
"""leaves each start 2^37 numbers that JavaScript can tell apart"""


def marks(members: Iterable[Member]) -> dict[ReplicaId, int]:
    """Replica -> what its start is known by: a hash; of two with the same, one pair in 65,536, the later takes the next."""
    taken: dict[int, ReplicaId] = {}
    for member in sorted(members, key=lambda member: member.replica):
        start = f"{member.replica}\0{member.epoch}".encode()
        mark = int.from_bytes(blake2b(start, digest_size=8).digest(), "little") % _MARKS
        while mark in taken:
            mark = (mark + 1) % _MARKS
        taken[mark] = member.replica
    return {replica: mark for mark, replica in taken.items()}


def number_of(own: int, mark: int) -> int:
    """What the ingresses call a replica's node."""
    return own * _MARKS + mark


def origin(number: int) -> tuple[int, int]:
    """A node's number at its replica, and the mark of that."""
    return divmod(number, _MARKS)


def forest(pools: Mapping[ReplicaId, PoolStatistics], marked: Mapping[ReplicaId, int]) -> tuple[PrefixStatistics, ...]:
    """The part of all trees that weighs most (tokens by holders), never a node without its parent."""
    families: dict[tuple[ReplicaId, int | None], list[PrefixStatistics]] = {}
    for replica, pool in pools.items():
        for prefix in pool.prefixes:
            families.setdefault((replica, prefix.parent), []).append(prefix)
    heap: list[tuple[int, ReplicaId, int, PrefixStatistics]] = []

    def push(replica: ReplicaId, parent: int | None) -> None:
        for prefix in families.get((replica, parent), ()):
            heapq.heappush(heap, (-prefix.n_tokens * prefix.holders, replica, prefix.number, prefix))

    for replica in pools:
        push(replica, None)
    shown: list[PrefixStatistics] = []
    while heap and len(shown) < MAX_PREFIXES:
        _, replica, own, prefix = heapq.heappop(heap)
        mark = marked[replica]
        parent = None if prefix.parent is None else number_of(prefix.parent, mark)
        shown.append(replace(prefix, number=number_of(own, mark), parent=parent, replica=replica))
        push(replica, own)
    return tuple(shown)
