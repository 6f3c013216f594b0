"""A sequence: one path from a root of the radix tree to a node's end, held under one of the engine's sequence ids."""

from __future__ import annotations

from array import array

from pasture.core.statistics import SequenceState
from pasture.core.values import Namespace, RequestId, SeqId
from pasture.kv.radix import Node


class Sequence:
    """Owned by the pool; others read it. `length` tokens are in the live cache, and the path ends exactly at `tail`'s end."""

    __slots__ = ("_id", "length", "namespace", "request_id", "state", "tail")

    def __init__(self, seq_id: SeqId, namespace: Namespace, tail: Node[Sequence], request_id: RequestId) -> None:
        self._id = seq_id
        self.namespace = namespace
        self.tail = tail
        self.length = 0
        self.state = SequenceState.PREFILLING
        self.request_id: RequestId | None = request_id

    @property
    def id(self) -> SeqId:
        return self._id

    @property
    def idle(self) -> bool:
        return self.state is SequenceState.IDLE

    def tokens(self) -> array[int]:
        """The token ids at positions `[0, length)`."""
        return self.tail.path_tokens()

    def __repr__(self) -> str:
        return f"<sequence {self._id} {self.state} of {self.length} tokens>"
