"""Hearing what a RAM tier holds: a policy that tells somebody what enters and leaves, and leaves judgement to another policy.

A tier tells its policy of every block that comes or goes, so who listens there knows its content unasked. Called under the
tier's lock: a listener does no more than note it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pasture.core.storage import BlockKey
from pasture.core.values import Kind
from pasture.tiers.entries import Entry
from pasture.tiers.eviction import EvictionPolicy, PolicyMaker, Wanted


class Listener(Protocol):
    """Any thread, under the tier's lock."""

    def stored(self, key: BlockKey) -> None: ...
    def removed(self, key: BlockKey) -> None: ...


class WatchedPolicy:
    """Another policy, and a listener to what enters and leaves."""

    def __init__(self, policy: EvictionPolicy, listener: Listener) -> None:
        self._policy = policy
        self._listener = listener

    def arrived(self, path: Sequence[BlockKey]) -> None:
        self._policy.arrived(path)

    def finished(self, path: Sequence[BlockKey], kind: Kind) -> None:
        self._policy.finished(path, kind)

    def entered(self, entry: Entry) -> None:
        self._listener.stored(entry.block.address.key)
        self._policy.entered(entry)

    def removed(self, entry: Entry) -> None:
        self._listener.removed(entry.block.address.key)
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


def watched(make: PolicyMaker, listener: Listener) -> PolicyMaker:
    """The same policies, and the listener hears of every tier's blocks that gets one."""

    def made(wanted: Wanted) -> EvictionPolicy:
        return WatchedPolicy(make(wanted), listener)

    return made
