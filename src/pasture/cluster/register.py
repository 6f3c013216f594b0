"""The list of who is in a cluster, as one place keeps it: replicas put themselves on it again and again, routers read it.

A replica that has said nothing for `FORGOTTEN_SECONDS` is left out, and a later start of it takes the place of an earlier one.
That a replica is to be drained is remembered for this start of it alone. Plain and sequential: whoever keeps it sees to that.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from pasture.cluster.members import Member
from pasture.cluster.values import Epoch, ReplicaId
from pasture.core.ports import Clock

FORGOTTEN_SECONDS = 30.0


class Register:
    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._members: dict[ReplicaId, tuple[Member, float]] = {}
        self._draining: set[tuple[ReplicaId, Epoch]] = set()

    def join(self, member: Member) -> None:
        """It is there; said again at least every few seconds."""
        known = self._members.get(member.replica)
        if known is None or known[0].epoch <= member.epoch:
            draining = (member.replica, member.epoch) in self._draining
            self._members[member.replica] = (replace(member, draining=draining), self._clock())

    def leave(self, replica: ReplicaId, epoch: Epoch) -> None:
        known = self._members.get(replica)
        if known is not None and known[0].epoch == epoch:
            del self._members[replica]

    def drain(self, replica: ReplicaId) -> None:
        """It gets nothing new; nothing happens when it is unknown."""
        known = self._members.get(replica)
        if known is not None:
            self._draining.add((replica, known[0].epoch))
            self._members[replica] = (replace(known[0], draining=True), known[1])

    def members(self) -> Sequence[Member]:
        """Everybody who was heard of lately."""
        now = self._clock()
        for replica in [name for name, (_, seen) in self._members.items() if now - seen > FORGOTTEN_SECONDS]:
            del self._members[replica]
        return tuple(member for member, _ in self._members.values())
