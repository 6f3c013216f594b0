"""Blocks that are on their way: prompts in flight, and where they are being computed.

A prompt that begins as one in flight does will find what they have in common where that one went, though nobody has reported it
yet. Prompts are looked up by their beginning, and the last few with the same beginning are compared. What is here is a hope: it
says how much will be left to compute, and is never pulled. Pure; one thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from pasture.cluster.values import ReplicaId
from pasture.core.storage import BlockKey
from pasture.core.values import RequestId

COMPARED = 8
"""prompts with the same beginning, the last ones"""


@dataclass(frozen=True, slots=True)
class _Prompt:
    head: BlockKey
    replica: ReplicaId
    path: Sequence[BlockKey]


class Coming:
    def __init__(self) -> None:
        self._prompts: dict[RequestId, _Prompt] = {}
        self._by_head: dict[BlockKey, dict[RequestId, _Prompt]] = {}

    def started(self, request: RequestId, head: BlockKey, replica: ReplicaId, path: Sequence[BlockKey]) -> None:
        """It was sent there. One that was in flight elsewhere is not any more."""
        self.finished(request)
        prompt = self._prompts[request] = _Prompt(head, replica, path)
        self._by_head.setdefault(head, {})[request] = prompt

    def finished(self, request: RequestId) -> None:
        """What it has left behind is reported by its replica from now on; nothing happens when it is unknown."""
        prompt = self._prompts.pop(request, None)
        if prompt is not None:
            same = self._by_head[prompt.head]
            del same[request]
            if not same:
                del self._by_head[prompt.head]

    def forget(self, replica: ReplicaId) -> None:
        """It has restarted or left."""
        for request in [request for request, prompt in self._prompts.items() if prompt.replica == replica]:
            self.finished(request)

    def leading(self, head: BlockKey, path: Sequence[BlockKey]) -> Mapping[ReplicaId, int]:
        """How many of these blocks, from the first, will be at each replica; who will have none is left out."""
        found: dict[ReplicaId, int] = {}
        for prompt in islice(reversed(self._by_head.get(head, {}).values()), COMPARED):
            pairs = enumerate(zip(prompt.path, path, strict=False))
            common = next((index for index, (a, b) in pairs if a != b), min(len(prompt.path), len(path)))
            if common > found.get(prompt.replica, 0):
                found[prompt.replica] = common
        return found
