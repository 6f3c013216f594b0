"""Who is in the cluster: what a replica says of itself, and the list of all that routers and peers read.

The list is soft state: replicas put themselves on it when they start and again every second, so a list that was lost fills
up again; whether a replica is alive is found out by its connection and not here. Values and a port; no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

from pasture.cluster.values import Epoch, ReplicaId
from pasture.core.ports import Vocabulary
from pasture.core.values import ModelInfo


@dataclass(frozen=True, slots=True)
class Member:
    """One start of one replica, and where it listens."""

    replica: ReplicaId
    epoch: Epoch
    host: str
    port: int
    node: str = ""
    """the machine's name for people"""
    pid: int = 0
    draining: bool = False


class Directory(Protocol):
    """Where the list is. Any implementation may fail for a while: then the last list goes on to count."""

    async def join(self, member: Member) -> None:
        """It is there, and takes requests unless it is to be drained; an older epoch of it is forgotten."""
        ...

    async def leave(self, replica: ReplicaId, epoch: Epoch) -> None: ...
    async def drain(self, replica: ReplicaId) -> None:
        """From now on it gets nothing new."""
        ...

    async def members(self) -> Sequence[Member]: ...


@dataclass(frozen=True, slots=True)
class Identity:
    """What a replica computes with. Two may exchange KV, or go on with each other's streams, where fingerprints are equal."""

    model: ModelInfo
    fingerprint: str
    """of model and KV format, as the keys of blocks have it; hexadecimal"""
    vocabulary: str
    """of the vocabulary: who tokenises for a replica must have the same"""
    max_conversation_tokens: int


def vocabulary_mark(vocabulary: Vocabulary) -> str:
    """Equal where tokens mean the same."""
    mark = blake2b(digest_size=16)
    for token in range(vocabulary.n_tokens):
        mark.update(vocabulary.piece(token, special=True) + b"\0")
    return mark.hexdigest()
