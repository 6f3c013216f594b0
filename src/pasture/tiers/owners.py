"""Whose the blocks in RAM are, and who goes when room is needed: an eviction policy for each owner, and shares between them.

    an owner over its own limit    gives up what its policy values least, for a block of its own
    a tier over its budget         of the owners that hold more than they are guaranteed, the one whose victim was used least
                                   lately; nobody is pushed below its guarantee by somebody else's block

An owner is the root of its blocks' chains. Blocks on nobody's account have one policy together and no guarantee. With a single
owner all this is that owner's policy and nothing else. A victim that was drawn and not taken stays drawn, because policies do
not take things back for nothing. Belongs to the RAM tier; its lock is held.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from pasture.core.ports import Clock
from pasture.core.shares import Shares
from pasture.core.storage import BlockKey
from pasture.core.values import Allowance, Kind
from pasture.tiers.entries import Entry
from pasture.tiers.eviction import EvictionPolicy, PolicyMaker, Wanted

Owner = BlockKey | None


class Owners:
    def __init__(self, policy: PolicyMaker, wanted: Wanted, clock: Clock = time.monotonic) -> None:
        """`wanted`: whether an entry can still go. `clock` is that of guarantees, not the policy's."""
        self._make = policy
        self._wanted = wanted
        self._policies: dict[Owner, EvictionPolicy] = {None: policy(wanted)}
        self._blocks: dict[Owner, int] = {}
        self._drawn: dict[Owner, tuple[Entry, int]] = {}
        """owner -> its victim, when it was used last as it was drawn"""
        self.shares: Shares[Owner] = Shares(_ram_bytes, clock)
        self.bytes: dict[Owner, int] = {}
        """what is on whose account"""

    # What happens, for the policies

    def arrived(self, owner: Owner, path: Sequence[BlockKey]) -> None:
        self._policy(owner).arrived(path)

    def finished(self, owner: Owner, path: Sequence[BlockKey], kind: Kind) -> None:
        self._policy(owner).finished(path, kind)

    def used(self, entries: Sequence[Entry]) -> None:
        """All of one owner."""
        if entries:
            self._policy(entries[0].owner).used(entries)

    def offered(self, entry: Entry) -> None:
        self._policy(entry.owner).offered(entry)

    def expects(self, owner: Owner, key: BlockKey) -> float:
        """What the owner's policy expects of one of its blocks."""
        return self._policy(owner).expects(key)

    # Accounts

    def entered(self, entry: Entry) -> None:
        """A block is new here."""
        owner = entry.owner
        self._blocks[owner] = self._blocks.get(owner, 0) + 1
        self.account(owner, entry.size)
        self._policy(owner).entered(entry)

    def removed(self, entry: Entry) -> None:
        """A block is gone."""
        owner = entry.owner
        self._policy(owner).removed(entry)
        drawn = self._drawn.get(owner)
        if drawn is not None and drawn[0] is entry:
            del self._drawn[owner]
        self.account(owner, -entry.size)
        self._blocks[owner] -= 1
        if not self._blocks[owner]:
            del self._blocks[owner], self.bytes[owner]

    def account(self, owner: Owner, n_bytes: int) -> None:
        """So many more, or fewer."""
        self.bytes[owner] = self.bytes.get(owner, 0) + n_bytes

    def over(self, owner: Owner, n_bytes: int) -> int:
        """Bytes by which `n_bytes` more would exceed the owner's own limit; 0 or less within it, or without one."""
        limit = None if owner is None else self.shares.limit(owner)
        return 0 if limit is None else self.bytes.get(owner, 0) + n_bytes - limit

    # Who goes

    def victim(self, budget_bytes: int, newcomer: Entry | None) -> Entry | None:
        """Take out who goes for a block that comes (None: because there is less room); None when there is nobody."""
        if len(self._blocks) == 1:  # the usual case, at the usual cost
            [only] = self._blocks
            if newcomer is None or newcomer.block.owner == only:
                return self.victim_of(only)
        beyond = self.shares.beyond(self.bytes, budget_bytes)
        if newcomer is None:
            return self._coldest(beyond) or self._coldest(list(self.bytes))
        mine = newcomer.owner
        return self._coldest(beyond if mine in beyond or mine not in self.bytes else [*beyond, mine])

    def victim_of(self, owner: Owner) -> Entry | None:
        """Take out who of the owner's goes first."""
        if owner in self._drawn:
            return self._coldest([owner])
        return self._policy(owner).victim()

    def admits(self, newcomer: Entry, victim: Entry, budget_bytes: int) -> bool:
        """Whether the newcomer may take the victim's place: by right where its owner lacks what is guaranteed, or by worth."""
        mine, others = newcomer.owner, newcomer.owner != victim.owner
        if others and self.bytes.get(mine, 0) + newcomer.size <= self.shares.guaranteed(mine, budget_bytes):
            return True
        return self._policy(mine).admits(newcomer, victim)

    # Inside

    def _coldest(self, owners: Iterable[Owner]) -> Entry | None:
        best: Entry | None = None
        for owner in owners:
            entry = self._draw(owner)
            if entry is not None and (best is None or entry.last_used < best.last_used):
                best = entry
        if best is not None:
            del self._drawn[best.owner]
        return best

    def _draw(self, owner: Owner) -> Entry | None:
        drawn, policy = self._drawn.pop(owner, None), self._policy(owner)
        if drawn is not None:
            entry, used = drawn
            if self._wanted(entry):
                if entry.last_used == used:
                    self._drawn[owner] = drawn
                    return entry
                policy.offered(entry)
        victim = policy.victim()
        if victim is not None:
            self._drawn[owner] = (victim, victim.last_used)
        return victim

    def _policy(self, owner: Owner) -> EvictionPolicy:
        policy = self._policies.get(owner)
        if policy is None:
            self._forget()
            policy = self._policies[owner] = self._make(self._wanted)
        return policy

    def _forget(self) -> None:
        """The policies of owners that have nothing here and have not asked for anything lately."""
        for owner in list(self._policies):
            if not (owner is None or owner in self._blocks or self.shares.knows(owner)):
                del self._policies[owner]


def _ram_bytes(allowance: Allowance) -> int | None:
    return allowance.ram_bytes
