"""A trace against a fleet of simulated nodes: the loop over events, and what it counts.

Three kinds of events in order of time: a request arrives, a prompt is computed, a reply has ended. A node computes one prompt
after the other; its blocks are looked up when its turn comes and stored when it is computed. Requests arrive when the trace
says, or so many are kept in flight and the next comes when one ends. `nodes.py` says what is assumed. One thread.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import numpy as np

from pasture.core.ports import Clock
from pasture.core.storage import BLOCK_TOKENS
from pasture.core.values import Form
from pasture.foresight.nodes import Job, LoadModel, Node, Rule, Waiting
from pasture.foresight.replay import TrailMaker, VirtualClock
from pasture.foresight.traces import TRACE_BLOCK_TOKENS, TraceRequest
from pasture.tiers.block import Block
from pasture.tiers.eviction import PolicyMaker

WINDOW_SECONDS = 300.0
"""over which the nodes' loads are compared, beside the whole trace"""
_NOTHING = np.empty(0, np.uint8)


@dataclass(slots=True)
class FleetTally:
    """What a replay has counted so far."""

    n_nodes: int
    requests: int = 0
    prompt_tokens: int = 0
    local_tokens: int = 0
    """found where the request went"""
    pulled_tokens: int = 0
    """fetched from another node"""
    moved_bytes: int = 0
    ended: int = 0
    """replies"""
    ended_at: float = 0.0
    """when the last of them did"""
    steady: tuple[float, int] = (0.0, 0)
    """when the last request so far came, and how many replies had ended by then"""
    first_token_seconds: list[float] = field(default_factory=list)
    """a request each: waiting, pulling and prefill"""
    windows: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    """number of the window -> node seconds of work that began in it, by node"""

    @property
    def hit_ratio(self) -> float:
        """Of prompt tokens, those that were not computed."""
        return (self.local_tokens + self.pulled_tokens) / max(1, self.prompt_tokens)

    @property
    def local_hit_ratio(self) -> float:
        return self.local_tokens / max(1, self.prompt_tokens)

    def work(self, at: float, node: int, seconds: float) -> None:
        loads = self.windows[int(at // WINDOW_SECONDS)]
        loads.extend([0.0] * (self.n_nodes - len(loads)))
        loads[node] += seconds

    def loads(self) -> list[float]:
        """Node seconds of work, by node."""
        return [sum(loads) for loads in zip(*self.windows.values(), strict=True)] or [0.0] * self.n_nodes

    @property
    def max_over_mean(self) -> float:
        """Of the nodes' work in the whole trace."""
        return max_over_mean(self.loads())

    @property
    def window_max_over_mean(self) -> float:
        """The mean over all windows of the same."""
        return float(np.mean([max_over_mean(loads) for loads in self.windows.values()])) if self.windows else 1.0

    @property
    def requests_per_second(self) -> float:
        """Until the last request came: without the time in which the fleet empties."""
        seconds, ended = self.steady
        return ended / seconds if seconds else 0.0

    @property
    def utilisation(self) -> float:
        """The share of the nodes' time that their work takes."""
        return sum(self.loads()) / max(1e-9, self.n_nodes * self.ended_at)

    @property
    def mean_first_token(self) -> float:
        return float(np.mean(self.first_token_seconds)) if self.first_token_seconds else 0.0

    def first_token(self, percentile: float) -> float:
        """Seconds to the first token, waiting included."""
        return float(np.percentile(self.first_token_seconds, percentile)) if self.first_token_seconds else 0.0


def max_over_mean(loads: Sequence[float]) -> float:
    mean = sum(loads) / len(loads)
    return max(loads) / mean if mean else 1.0


class FleetReplay:
    """`n_nodes` nodes that share `capacity_tokens` evenly, under one rule. Plays one trace."""

    def __init__(
        self, n_nodes: int, capacity_tokens: int, policy: Callable[[Clock], PolicyMaker], rule: Rule, model: LoadModel
    ) -> None:
        self.clock = VirtualClock()
        self.tally = FleetTally(n_nodes)
        self.nodes = [Node(number, capacity_tokens // n_nodes, policy(self.clock)) for number in range(n_nodes)]
        self._rule = rule
        self._model = model
        self._maker = TrailMaker()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._next: Iterator[TraceRequest] = iter(())
        self._each: Callable[[], object] = lambda: None

    def play(
        self, requests: Sequence[TraceRequest], in_flight: int | None = None, each: Callable[[], object] = lambda: None
    ) -> FleetTally:
        """`in_flight`: so many requests a node, in order, instead of the trace's times; `each`: after every reply."""
        self._each = each
        if in_flight is None:
            for request in requests:
                self._at(request.at, partial(self._arrive, request))
        else:
            self._next = iter(requests)
            for _ in range(in_flight * len(self.nodes)):
                self._at(0.0, self._arrive_next)
        while self._events:
            self.clock.now, _, happen = heapq.heappop(self._events)
            happen()
        return self.tally

    def _at(self, at: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at, next(self._order), happen))

    # What happens to a request

    def _arrive_next(self) -> None:
        request = next(self._next, None)
        if request is not None:
            self._arrive(request)

    def _arrive(self, request: TraceRequest) -> None:
        trail = self._maker.trail(request.blocks)
        job = Job(self.tally.requests, request, trail, tuple(trail[index].key for index in range(trail.n_blocks)))
        self.tally.requests += 1
        self.tally.steady = (self.clock.now, self.tally.ended)
        self.tally.prompt_tokens += request.n_tokens
        choice = self._rule.place(job, self.nodes)
        self._rule.placed(job, choice)
        node = self.nodes[choice.node]
        node.take(Waiting(job, choice, self.clock.now, request.n_tokens - tokens_of(job, node.leading(job))))
        self._begin(node)

    def _begin(self, node: Node) -> None:
        if node.at_work or not node.queue:
            return
        node.at_work = True
        waiting = node.queue.popleft()
        job, tier, model = waiting.job, node.tier, self._model
        tier.arrived(job.trail)
        n_local = node.leading(job)
        tier.fetch(job.trail, 0, n_local * BLOCK_TOKENS)
        n_there = max(n_local, self._pullable(waiting))
        local = tokens_of(job, n_local)
        pulled = tokens_of(job, n_there) - local
        uncached = job.request.n_tokens - local - pulled
        seconds = model.prefill_seconds(uncached, node.n_streams) + (model.moving_seconds(pulled) if pulled else 0.0)
        self.tally.local_tokens += local
        self.tally.pulled_tokens += pulled
        self.tally.moved_bytes += model.moved_bytes(pulled)
        self.tally.work(self.clock.now, node.number, model.node_seconds(uncached, job.request.n_reply_tokens))
        self._at(self.clock.now + seconds, partial(self._computed, node, waiting, n_local))

    def _pullable(self, waiting: Waiting) -> int:
        """Leading blocks that the node it pulls from, if any, still has; it counts as a use of them."""
        if waiting.choice.pull_from is None:
            return 0
        owner = self.nodes[waiting.choice.pull_from]
        n_there = owner.leading(waiting.job)
        owner.tier.fetch(waiting.job.trail, 0, n_there * BLOCK_TOKENS)
        return n_there

    def _computed(self, node: Node, waiting: Waiting, n_local: int) -> None:
        job, trail = waiting.job, waiting.job.trail
        for index in range(n_local, trail.n_blocks):
            if not node.tier.insert(Block(trail[index], trail.part(index), Form.RAW, _NOTHING)):
                break
        stored, removed = node.changes()
        if stored or removed:
            self._rule.changed(node.number, stored, removed)
        self.tally.first_token_seconds.append(self.clock.now - waiting.arrived_at)
        node.computed(waiting)
        self._rule.prefilled(job)
        self._at(self.clock.now + self._model.decode_seconds(job.request.n_reply_tokens), partial(self._end, node, job))
        self._begin(node)

    def _end(self, node: Node, job: Job) -> None:
        node.ended(job)
        node.tier.finished(job.trail, job.request.expects)
        self._rule.finished(job)
        self.tally.ended += 1
        self.tally.ended_at = self.clock.now
        self._each()
        self._arrive_next()


def tokens_of(job: Job, n_blocks: int) -> int:
    """That leading blocks save of its prompt."""
    return min(n_blocks * TRACE_BLOCK_TOKENS, job.request.n_tokens)
