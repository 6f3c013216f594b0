"""A trace against the RAM tier that a server has, and its policy, on a virtual clock.

A request looks for the longest prefix of its blocks that is there, uses it, and stores the rest: as a request does that finds
nothing in the live cache and leaves it at once. A trace's block of 512 tokens is one block here (the tier's code never asks how
long a block is, only how many there are), its id is its key and its tokens, and every block weighs the same. Events reach the
tier in order of time, and nothing of the trace but what has happened by then: a reply's end is told when it ends, and where the
trace does not say when that was, at once.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pasture.core.ports import Clock
from pasture.core.storage import BLOCK_TOKENS, BlockKey
from pasture.core.values import Form, Kind
from pasture.foresight.traces import TRACE_BLOCK_TOKENS, TraceRequest
from pasture.tiers.block import Block
from pasture.tiers.entries import BLOCK_OVERHEAD_BYTES
from pasture.tiers.eviction import PolicyMaker
from pasture.tiers.keys import Address
from pasture.tiers.memory import MemoryTier
from pasture.tiers.trail import Trail

_NOTHING = np.empty(0, np.uint8)
_ROOT = BlockKey(b"root")


class VirtualClock:
    """Stands still until it is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TraceTrail(Trail):
    """A request's blocks as the tiers walk them, all known beforehand."""

    def __init__(self, blocks: list[Block], ids: Sequence[int]) -> None:
        self.tokens = array("i", np.repeat(np.asarray(ids, np.int32), BLOCK_TOKENS).tobytes())
        self.owner = _ROOT
        self.n_blocks = len(blocks)
        self.blocks = blocks
        self._found = [block.address for block in blocks]

    def part(self, index: int) -> array[int]:
        return self.blocks[index].tokens


class TrailMaker:
    """Blocks of a trace; each is made once, and weighs nothing beyond its overhead."""

    def __init__(self) -> None:
        self._blocks: dict[int, Block] = {}

    def trail(self, ids: Sequence[int]) -> TraceTrail:
        found: list[Block] = []
        parent = _ROOT
        for index, number in enumerate(ids):
            block = self._blocks.get(number)
            if block is None:
                p0 = index * BLOCK_TOKENS
                address = Address(key_of(number), parent, p0, p0 + BLOCK_TOKENS)
                block = Block(address, array("i", (number,)) * BLOCK_TOKENS, Form.RAW, _NOTHING)
                self._blocks[number] = block
            found.append(block)
            parent = block.address.key
        return TraceTrail(found, ids)


def key_of(block: int) -> BlockKey:
    return BlockKey(block.to_bytes(8, "big"))


def bytes_for(capacity_tokens: int) -> int:
    """The tier's budget for so many tokens of trace blocks, which weigh what the tier counts beside a payload."""
    return capacity_tokens // TRACE_BLOCK_TOKENS * BLOCK_OVERHEAD_BYTES


@dataclass(slots=True)
class Tally:
    """What a replay has counted so far."""

    requests: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    blocks: int = 0
    """block operations: every block of every request, found or not"""
    stored_blocks: int = 0
    evicted_blocks: int = 0

    @property
    def hit_ratio(self) -> float:
        return self.hit_tokens / max(1, self.prompt_tokens)


@dataclass(order=True, slots=True)
class _Ending:
    at: float
    turn: int
    trail: TraceTrail = field(compare=False)
    expects: Kind = field(compare=False)


class Replay:
    """One tier under one policy. `play` requests in order of time."""

    def __init__(self, capacity_tokens: int, policy: Callable[[Clock], PolicyMaker]) -> None:
        self.clock = VirtualClock()
        self.tally = Tally()
        self.tier = MemoryTier(bytes_for(capacity_tokens), policy=policy(self.clock))
        self._maker = TrailMaker()
        self._endings: list[_Ending] = []

    def play(self, requests: Iterable[TraceRequest], each: Callable[[Tally], object] = lambda tally: None) -> Tally:
        """Replay; `each` is called after every request."""
        for request in requests:
            self._end_until(request.at)
            self.clock.now = request.at
            self._serve(request)
            each(self.tally)
        self.tally.evicted_blocks = self.tier.statistics().evicted_blocks
        return self.tally

    def _serve(self, request: TraceRequest) -> None:
        trail, tally, tier = self._maker.trail(request.blocks), self.tally, self.tier
        tier.arrived(trail)
        reach = tier.reach(trail)
        tier.fetch(trail, 0, reach)
        n_found = reach // BLOCK_TOKENS
        for block in trail.blocks[n_found:]:
            if not tier.insert(block):
                break
            tally.stored_blocks += 1
        tally.requests += 1
        tally.blocks += trail.n_blocks
        tally.prompt_tokens += request.n_tokens
        tally.hit_tokens += min(n_found * TRACE_BLOCK_TOKENS, request.n_tokens)
        if request.finished_at is None:
            tier.finished(trail, request.expects)
        else:
            heapq.heappush(self._endings, _Ending(request.finished_at, tally.requests, trail, request.expects))

    def _end_until(self, at: float) -> None:
        while self._endings and self._endings[0].at <= at:
            ending = heapq.heappop(self._endings)
            self.clock.now = ending.at
            self.tier.finished(ending.trail, ending.expects)
