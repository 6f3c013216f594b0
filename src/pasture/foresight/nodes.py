"""A fleet of simulated nodes under recorded traffic: what a rule that places requests would have found, moved and kept waiting.

Each node has the RAM tier and the policy of a server (as in `replay.py`) and computes one prompt after the other; what it
computes or pulls is stored when its prefill ends. Time is virtual and comes from a `LoadModel`; nothing is measured here.

    arrival ──rule.place──► queue of a node ──► pull, prefill ──► first token ──► decode, beside other streams ──► end

What a rule is told is what a router would know by then. The rules are in `pasture.cluster`, the loop is in `nodes_replay.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pasture.core.storage import BLOCK_TOKENS, BlockKey
from pasture.foresight.replay import TraceTrail, bytes_for
from pasture.foresight.traces import TraceRequest
from pasture.tiers.eviction import PolicyMaker
from pasture.tiers.memory import MemoryTier
from pasture.tiers.watching import watched

PREFILL_TOKENS_PER_SECOND = 8000.0
"""assumed, unless somebody knows better"""


@dataclass(frozen=True, slots=True)
class LoadModel:
    """What a node takes for its work; the figures are assumptions, and every output names them."""

    prefill_tokens_per_second: float = PREFILL_TOKENS_PER_SECOND
    """of a node that does nothing else"""
    token_seconds: float = 0.03
    """from one token of a stream to the next"""
    full_streams: int = 32
    """so many streams fill a node; each takes its part from prefill"""
    kv_bytes_per_token: int = 320 * 1024
    link_bytes_per_second: float = 10e9
    link_seconds: float = 1e-3

    def prefill_seconds(self, n_tokens: int, n_streams: int) -> float:
        """Beside so many streams; a tenth of the node is always left for prefill."""
        return n_tokens / (self.prefill_tokens_per_second * max(0.1, 1 - n_streams / self.full_streams))

    def decode_seconds(self, n_tokens: int) -> float:
        return n_tokens * self.token_seconds

    def node_seconds(self, uncached_tokens: int, reply_tokens: int) -> float:
        """Of a whole node's time that a request takes."""
        return self.prefill_seconds(uncached_tokens, 0) + self.decode_seconds(reply_tokens) / self.full_streams

    def moved_bytes(self, n_tokens: int) -> int:
        return n_tokens * self.kv_bytes_per_token

    def moving_seconds(self, n_tokens: int) -> float:
        return self.link_seconds + self.moved_bytes(n_tokens) / self.link_bytes_per_second

    def pull_seconds(self, n_tokens: int) -> float | None:
        """Seconds that moving so many tokens' KV takes; None where recomputing is quicker."""
        seconds = self.moving_seconds(n_tokens)
        return seconds if seconds < self.prefill_seconds(n_tokens, 0) else None


@dataclass(frozen=True, slots=True)
class Job:
    """One request on its way."""

    number: int
    request: TraceRequest
    trail: TraceTrail
    path: tuple[BlockKey, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """Where a job goes."""

    node: int
    pull_from: int | None = None
    """a node whose blocks are fetched rather than recomputed, as far as it still has them"""


class Rule(Protocol):
    """Who places jobs. It hears of everything in order of time."""

    def place(self, job: Job, nodes: Sequence[Node]) -> Choice: ...
    def placed(self, job: Job, choice: Choice) -> None: ...
    def prefilled(self, job: Job) -> None:
        """Its first token is out."""
        ...

    def finished(self, job: Job) -> None: ...
    def changed(self, node: int, stored: Sequence[BlockKey], removed: Sequence[BlockKey]) -> None:
        """What a node holds is different now."""
        ...


@dataclass(slots=True)
class _Changes:
    """What came and went since somebody asked."""

    new: list[BlockKey] = field(default_factory=list)
    gone: list[BlockKey] = field(default_factory=list)

    def stored(self, key: BlockKey) -> None:
        self.new.append(key)

    def removed(self, key: BlockKey) -> None:
        self.gone.append(key)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A job in a node's queue."""

    job: Job
    choice: Choice
    arrived_at: float
    uncached_tokens: int
    """as the node's tier was when it came"""


class Node:
    """One node: what rules may look at, and its tier."""

    def __init__(self, number: int, capacity_tokens: int, policy: PolicyMaker) -> None:
        self.number = number
        self.uncached_tokens = 0
        """of the prompts that wait or are being computed"""
        self.n_requests = 0
        """that wait, are computed or decoded"""
        self.active_blocks = 0
        """of all of those"""
        self.n_streams = 0
        """that are decoded"""
        self.queue: deque[Waiting] = deque()
        self.at_work = False
        self._changes = _Changes()
        self.tier = MemoryTier(bytes_for(capacity_tokens), policy=watched(policy, self._changes))

    def leading(self, job: Job) -> int:
        """How many of its blocks, from the first, are here."""
        return self.tier.reach(job.trail) // BLOCK_TOKENS

    def take(self, waiting: Waiting) -> None:
        self.queue.append(waiting)
        self.uncached_tokens += waiting.uncached_tokens
        self.n_requests += 1
        self.active_blocks += len(waiting.job.path)

    def computed(self, waiting: Waiting) -> None:
        """Its prompt is; its reply begins."""
        self.uncached_tokens -= waiting.uncached_tokens
        self.n_streams += 1
        self.at_work = False

    def ended(self, job: Job) -> None:
        self.n_streams -= 1
        self.n_requests -= 1
        self.active_blocks -= len(job.path)

    def changes(self) -> tuple[list[BlockKey], list[BlockKey]]:
        """What was stored and what was removed since the last time."""
        changes = self._changes
        told = changes.new, changes.gone
        changes.new, changes.gone = [], []
        return told
