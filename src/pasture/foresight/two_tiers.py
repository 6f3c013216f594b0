"""A trace against two tiers: RAM under a policy, behind it a disk, and what is brought up before it is asked for.

A request asks for its blocks one after the other. What RAM has is used; what only the disk has is lifted, *on demand*; the
first block that nobody has ends that, and the rest is computed and stored in both. Lifted blocks are pinned until the request
is through, as in the server. What may come up earlier depends on `Ahead`:

    OFF        nothing
    RETURNS    before a request arrives: the server's own prefetcher, on the virtual clock, with what the policy expects
    HINTS      likewise, with what front ends say while their users type: hints that are made up for the trace (`typing_hints`)
    PATHS      after a request has arrived: what follows the blocks that it has asked for so far, by the paths of earlier ones

RETURNS and PATHS know the past alone, HINTS the hints too. No time passes between two blocks of a request, nor while one is
read: what is counted is what was asked of the disk in time, not whether a disk would have been fast enough. One thread.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import count

from pasture.core.ports import Clock
from pasture.core.storage import BLOCK_TOKENS, BlockKey, Pin
from pasture.core.values import Kind
from pasture.foresight.hints import Hint
from pasture.foresight.paths import Paths, Reading
from pasture.foresight.replay import TraceTrail, TrailMaker, VirtualClock, bytes_for
from pasture.foresight.shelf import Shelf
from pasture.foresight.traces import TRACE_BLOCK_TOKENS, TraceRequest
from pasture.tiers.eviction import PolicyMaker
from pasture.tiers.gate import OpenGate
from pasture.tiers.memory import MemoryTier
from pasture.tiers.prefetch import Prefetcher

ROUND_SECONDS = 3.0
"""between two rounds of the prefetcher"""


class Ahead(StrEnum):
    """What is brought into RAM before it is asked for."""

    OFF = "off"
    RETURNS = "returns"
    HINTS = "hints"
    PATHS = "paths"


@dataclass(slots=True)
class TierTally:
    """What a replay has counted so far; blocks are the trace's."""

    requests: int = 0
    prompt_tokens: int = 0
    ram_tokens: int = 0
    """found in RAM, whether they came ahead or not"""
    disk_tokens: int = 0
    """found on disk, and lifted on demand"""
    blocks: int = 0
    """block operations: every block of every request, found or not"""
    lifted_blocks: int = 0
    """on demand"""
    issued_blocks: int = 0
    """ahead"""
    used_blocks: int = 0
    """of those issued"""
    written_blocks: int = 0
    """to disk"""

    @property
    def precision(self) -> float | None:
        """The share of what was issued that was used; None where nothing was."""
        return self.used_blocks / self.issued_blocks if self.issued_blocks else None


class _Idle:
    """A disk on which nobody waits: the trace does not say when it would be busy."""

    busy = False


class TwoTiers:
    """`play` requests in order of time."""

    def __init__(
        self,
        ram_tokens: int,
        disk_tokens: int,
        policy: Callable[[Clock], PolicyMaker],
        ahead: Ahead = Ahead.OFF,
        hints: Iterable[Hint] = (),
    ) -> None:
        """`hints`: for `Ahead.HINTS`."""
        self.clock = VirtualClock()
        self.tally = TierTally()
        self.ram = MemoryTier(bytes_for(ram_tokens), policy=policy(self.clock))
        self.disk = Shelf(disk_tokens // TRACE_BLOCK_TOKENS)
        self._maker = TrailMaker()
        self._paths = Paths() if ahead is Ahead.PATHS else None
        self._prefetcher: Prefetcher | None = None
        if ahead in (Ahead.RETURNS, Ahead.HINTS):
            guesses = ahead is Ahead.RETURNS
            self._prefetcher = Prefetcher(self.ram, (self.disk,), OpenGate(1), _Idle(), guesses=guesses, clock=self.clock)
        self._next_round = 0.0
        self._numbers = count()
        self._events = [(hint.at, next(self._numbers), partial(self._hinted, hint)) for hint in hints]
        """what happens between requests, a heap: when, in which order, and what"""

    def play(self, requests: Iterable[TraceRequest], each: Callable[[TierTally], object] = lambda tally: None) -> TierTally:
        """Replay; `each` is called after every request."""
        for request in requests:
            self._pass_time(request.at)
            self._serve(request)
            each(self.tally)
        aheads, tally = self.ram.aheads, self.tally
        tally.issued_blocks = aheads.issued_blocks
        tally.used_blocks = aheads.used_blocks
        tally.written_blocks = self.disk.written_blocks
        return tally

    def _serve(self, request: TraceRequest) -> None:
        trail, tally = self._maker.trail(request.blocks), self.tally
        path = [trail[index].key for index in range(trail.n_blocks)]
        self.ram.arrived(trail)
        if self._prefetcher is not None:
            self._prefetcher.arrived(trail)
        ram, disk = self.ram, self.disk
        n_found = next((i for i, key in enumerate(path) if key not in disk and key not in ram), len(path))
        n_lifted = self._ask_for(trail, path[:n_found])
        for block in trail.blocks[n_found:]:
            disk.put(block)
        for block in trail.blocks[n_found:]:
            if not ram.insert(block):
                break
        disk.use(path)
        disk.trim()
        tally.requests += 1
        tally.blocks += len(path)
        tally.prompt_tokens += request.n_tokens
        found = min(n_found * TRACE_BLOCK_TOKENS, request.n_tokens)
        tally.lifted_blocks += n_lifted
        tally.disk_tokens += min(n_lifted * TRACE_BLOCK_TOKENS, found)
        tally.ram_tokens += found - min(n_lifted * TRACE_BLOCK_TOKENS, found)
        self._finish(request, trail, path)

    def _ask_for(self, trail: TraceTrail, path: Sequence[BlockKey]) -> int:
        """Have these blocks one after the other; returns how many had to be lifted on demand."""
        ram, disk, n_lifted = self.ram, self.disk, 0
        pins: list[Pin] = [ram.pin(trail)]
        reading = Reading(self._paths) if self._paths is not None else None
        for key in path:
            if key not in ram:
                pins.append(ram.insert_pinned(disk.block(key)))
                n_lifted += 1
            if reading is not None:
                wanted = [foreseen for foreseen in reading.asked(key) if foreseen in disk and foreseen not in ram]
                pins += [ram.insert_pinned(disk.block(foreseen), ahead=True) for foreseen in wanted]
        ram.missing(trail, 0, len(path) * BLOCK_TOKENS, use=True)
        for pin in pins:
            pin.release()
        return n_lifted

    def _finish(self, request: TraceRequest, trail: TraceTrail, path: Sequence[BlockKey]) -> None:
        if self._paths is not None:
            self._paths.learn(path)
        if request.finished_at is None:
            self._ended(trail, request.expects)
        else:
            ended = partial(self._ended, trail, request.expects)
            heapq.heappush(self._events, (request.finished_at, next(self._numbers), ended))

    def _hinted(self, hint: Hint) -> None:
        assert self._prefetcher is not None
        self._prefetcher.hint(self._maker.trail(hint.blocks), lambda: None)
        self._prefetcher.round()

    def _ended(self, trail: TraceTrail, expects: Kind) -> None:
        self.ram.finished(trail, expects)
        if self._prefetcher is not None:
            self._prefetcher.finished(trail)

    def _pass_time(self, until: float) -> None:
        """What happens before then: replies end, users type, and the prefetcher has its rounds."""
        while self._events and self._events[0][0] <= until:
            at, _, happen = heapq.heappop(self._events)
            self._rounds(at)
            self.clock.now = at
            happen()
        self._rounds(until)
        self.clock.now = until

    def _rounds(self, until: float) -> None:
        if self._prefetcher is None:
            return
        while self._next_round < until:
            self.clock.now = self._next_round
            self._prefetcher.round()
            self._next_round += ROUND_SECONDS
