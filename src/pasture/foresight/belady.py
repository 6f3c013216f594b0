"""Reference lines that know the whole trace: Belady's policy, which no server can have, and a cache without bounds.

Belady keeps what is used soonest and lets in only what is used sooner than something that is there; nothing that never comes
again. It sits in the same tier as every other policy, so it too evicts leaves first and is a bound for what trees can do.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from itertools import count
from math import inf

from pasture.core.storage import BlockKey
from pasture.core.values import Kind
from pasture.foresight.replay import key_of
from pasture.foresight.traces import TRACE_BLOCK_TOKENS, TraceRequest
from pasture.tiers.entries import Entry
from pasture.tiers.eviction import PolicyMaker, Wanted

Future = dict[BlockKey, deque[int]]
"""block -> the numbers of the requests that use it, first to last"""


class Belady:
    """For a tier that sees exactly the requests whose `future` this is. Uses the future up."""

    def __init__(self, wanted: Wanted, future: Future) -> None:
        self._wanted = wanted
        self._future = future
        self._heap: list[tuple[float, int, Entry]] = []
        self._turn = count()

    def arrived(self, path: Sequence[BlockKey]) -> None:
        for key in path:
            self._future[key].popleft()

    def finished(self, path: Sequence[BlockKey], kind: Kind) -> None: ...
    def entered(self, entry: Entry) -> None: ...
    def removed(self, entry: Entry) -> None: ...

    def used(self, entries: Sequence[Entry]) -> None:
        if entries:
            self.offered(entries[-1])  # the one leaf among them, whose next use is another now

    def offered(self, entry: Entry) -> None:
        heapq.heappush(self._heap, (-self._next_use(entry), next(self._turn), entry))

    def victim(self) -> Entry | None:
        while self._heap:
            next_use, _, entry = heapq.heappop(self._heap)
            if self._wanted(entry) and -next_use == self._next_use(entry):
                return entry
        return None

    def admits(self, newcomer: Entry, victim: Entry) -> bool:
        return self._next_use(newcomer) < self._next_use(victim)

    def expects(self, key: BlockKey) -> float:
        return 0.0

    def _next_use(self, entry: Entry) -> float:
        uses = self._future[entry.block.address.key]
        return uses[0] if uses else inf


def belady(requests: Sequence[TraceRequest]) -> PolicyMaker:
    future: Future = {}
    for number, request in enumerate(requests):
        for block in request.blocks:
            future.setdefault(key_of(block), deque()).append(number)
    return lambda wanted: Belady(wanted, future)


def unbounded_hit_ratio(requests: Sequence[TraceRequest]) -> float:
    """Of a cache that keeps everything."""
    seen: set[int] = set()
    hit_tokens = 0
    for request in requests:
        n_found = next((index for index, block in enumerate(request.blocks) if block not in seen), len(request.blocks))
        hit_tokens += min(n_found * TRACE_BLOCK_TOKENS, request.n_tokens)
        seen.update(request.blocks)
    return hit_tokens / max(1, sum(request.n_tokens for request in requests))
