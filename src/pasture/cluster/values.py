"""What replicas tell a router, what a router is asked, and what it answers.

    replica ── Delta(epoch, 1), Delta(epoch, 2), ... ──► router      what has changed, in order
    replica ◄───────── SnapshotRequest ───────────────── router      after a gap
    replica ── Snapshot(epoch, n) ─────────────────────► router      everything, as of number n

An epoch is one start of a replica: it holds nothing before its number 1, so a replica that starts with blocks (a disk that
survived) reports them like any others. Numbers go up by one within an epoch. Frozen values; no behaviour, no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NewType

from pasture.core.storage import BlockKey

ReplicaId = NewType("ReplicaId", str)
"""Who serves requests, or holds blocks for those who do. Stays the same over restarts."""

Epoch = NewType("Epoch", int)
"""One start of a replica; a later start has a larger one (the time of the start in nanoseconds will do)."""

SessionKey = NewType("SessionKey", str)
"""What belongs together for a client: a session's id, or whatever a client says instead (`x-session-id`)."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a replica can do; routers fill replicas in this proportion."""

    prefill_tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Load:
    """What a replica has accepted and not yet computed, from all routers."""

    uncached_tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """What has changed at a replica since the number before; removals come after what was stored."""

    replica: ReplicaId
    epoch: Epoch
    number: int
    """from 1 upwards within an epoch"""
    stored: Sequence[BlockKey] = ()
    removed: Sequence[BlockKey] = ()
    load: Load | None = None
    """None: not reported this time"""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything a replica holds after its delta `number`; 0 where it has not sent one yet."""

    replica: ReplicaId
    epoch: Epoch
    number: int
    blocks: Sequence[BlockKey]
    load: Load | None = None


@dataclass(frozen=True, slots=True)
class SnapshotRequest:
    """Numbers are missing: send a `Snapshot` of this epoch. Until it comes nothing is credited."""

    replica: ReplicaId
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Placement:
    """A request that wants a replica."""

    path: Sequence[BlockKey]
    """chained keys of its prompt's blocks, from the first; the last may be short"""
    n_tokens: int
    """of its prompt"""
    session: SessionKey | None = None
    avoid: frozenset[ReplicaId] = frozenset()
    """who must not get it: it has just failed there"""


class Reason(StrEnum):
    """Why a request goes where it goes."""

    SESSION = "session"
    """its session is at home there, and there is room"""
    PREFIX = "prefix"
    """enough of its prompt is known to be there, and there is room"""
    HEAD = "head"
    """its beginning was sent there before, and there is room"""
    RING = "ring"
    """nobody has enough of it: the ring's choice within the load bound"""
    SPILLED = "spilled"
    """where it belongs is saturated; it costs less here"""
    BUSY = "busy"
    """where it belongs is saturated, and it would cost no less anywhere else"""


@dataclass(frozen=True, slots=True)
class Pull:
    """Blocks that a replica should fetch from another rather than recompute."""

    owner: ReplicaId
    """who is known to hold them: a replica, or a shared pool"""
    first: int
    last: int
    """half-open range of `Placement.path`"""


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request goes."""

    replica: ReplicaId
    reason: Reason
    cached_tokens: int
    """of its prompt, known to be there"""
    uncached_tokens: int
    """left to compute there, after what is pulled"""
    pull: Pull | None = None
    """what it should fetch first; None: nothing, or it would not pay"""


@dataclass(frozen=True, slots=True)
class RouterStatistics:
    """What a router has done and what it knows."""

    decisions: Mapping[Reason, int]
    pulls: int
    gaps: int
    """snapshots asked for"""
    stale_events: int
    """from an epoch or with a number that had passed"""
    sessions: int
    known_blocks: int
    """different keys, wherever they are"""
    uncached_tokens: Mapping[ReplicaId, int]
    """in flight, by replica"""
