"""What a policy would do for a trace: one tier at several capacities, beside the reference lines.

Runs replays, one after the other, and gathers their figures; prints nothing. The references are LRU, S3-FIFO, Belady (who knows
the future) and a cache without bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import process_time

from pasture.core.ports import Clock
from pasture.foresight.belady import belady, unbounded_hit_ratio
from pasture.foresight.policies import POLICIES
from pasture.foresight.replay import Replay
from pasture.foresight.traces import TraceRequest
from pasture.tiers.eviction import PolicyMaker

BELADY = "belady"
REFERENCES = ("lru", "s3fifo", BELADY)


@dataclass(frozen=True, slots=True)
class Result:
    """One policy at one capacity."""

    policy: str
    capacity_tokens: int
    requests: int
    prompt_tokens: int
    hit_tokens: int
    stored_blocks: int
    evicted_blocks: int
    block_operations: int
    cpu_seconds: float

    @property
    def hit_ratio(self) -> float:
        return self.hit_tokens / max(1, self.prompt_tokens)

    @property
    def operations_per_second(self) -> float:
        """Of CPU time."""
        return self.block_operations / max(1e-9, self.cpu_seconds)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A trace's results, by capacity and then by policy."""

    results: tuple[Result, ...]
    unbounded: float
    """hit ratio of a cache without bounds"""

    def at(self, capacity_tokens: int, policy: str) -> Result | None:
        found = (r for r in self.results if r.capacity_tokens == capacity_tokens and r.policy == policy)
        return next(found, None)

    def way_to_belady(self, result: Result) -> float | None:
        """The share of the distance from LRU to Belady that a result has covered; None without both."""
        low, high = self.at(result.capacity_tokens, "lru"), self.at(result.capacity_tokens, BELADY)
        if low is None or high is None or high.hit_ratio <= low.hit_ratio:
            return None
        return (result.hit_ratio - low.hit_ratio) / (high.hit_ratio - low.hit_ratio)


def lines(policy: str, *, references: bool) -> tuple[str, ...]:
    """What is compared: the policy first, then the references it is not."""
    return (policy, *(name for name in REFERENCES if name != policy)) if references else (policy,)


def simulate(
    requests: Sequence[TraceRequest],
    policies: Sequence[str],
    capacities: Sequence[int],
    each: Callable[[str, int], object] = lambda policy, capacity: None,
) -> Comparison:
    """Replay the trace for every policy at every capacity; `each` is called after every request."""

    def results() -> Iterator[Result]:
        for capacity in capacities:
            for policy in policies:
                yield _replay(requests, policy, capacity, each)

    return Comparison(tuple(results()), unbounded_hit_ratio(requests))


def _replay(requests: Sequence[TraceRequest], policy: str, capacity: int, each: Callable[[str, int], object]) -> Result:
    def make(clock: Clock) -> PolicyMaker:
        return belady(requests) if policy == BELADY else POLICIES[policy](clock)

    replay = Replay(capacity, make)
    started = process_time()
    tally = replay.play(requests, lambda _: each(policy, capacity))
    seconds = process_time() - started
    return Result(
        policy=policy,
        capacity_tokens=capacity,
        requests=tally.requests,
        prompt_tokens=tally.prompt_tokens,
        hit_tokens=tally.hit_tokens,
        stored_blocks=tally.stored_blocks,
        evicted_blocks=tally.evicted_blocks,
        block_operations=tally.blocks,
        cpu_seconds=seconds,
    )
