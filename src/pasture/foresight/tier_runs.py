"""What RAM and disk together would have done for a trace: one policy with each way of fetching ahead, beside reference lines.

Runs replays of two tiers, one after the other, and gathers their figures; prints nothing. The references are LRU that fetches
on demand, whose fetches every recall is measured by, Belady in RAM (who knows the future), a cache without bounds, and how much
of the returns could have been foreseen at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import process_time

from pasture.core.ports import Clock
from pasture.foresight.belady import belady, unbounded_hit_ratio
from pasture.foresight.bounds import foreseeable
from pasture.foresight.hints import TYPING_SECONDS, typing_hints
from pasture.foresight.policies import POLICIES
from pasture.foresight.simulator import BELADY
from pasture.foresight.traces import TRACE_BLOCK_TOKENS, TraceRequest
from pasture.foresight.two_tiers import Ahead, TierTally, TwoTiers
from pasture.tiers.eviction import PolicyMaker

LRU = "lru"


@dataclass(frozen=True, slots=True)
class TierResult:
    """One policy, fetching ahead in one way."""

    policy: str
    ahead: Ahead
    tally: TierTally
    cpu_seconds: float

    @property
    def ram_hit_ratio(self) -> float:
        return self.tally.ram_tokens / max(1, self.tally.prompt_tokens)

    @property
    def disk_hit_ratio(self) -> float:
        return self.tally.disk_tokens / max(1, self.tally.prompt_tokens)

    @property
    def read_tokens(self) -> int:
        """From disk into RAM, on demand and ahead."""
        return (self.tally.lifted_blocks + self.tally.issued_blocks) * TRACE_BLOCK_TOKENS

    @property
    def written_tokens(self) -> int:
        return self.tally.written_blocks * TRACE_BLOCK_TOKENS

    @property
    def operations_per_second(self) -> float:
        """Of CPU time."""
        return self.tally.blocks / max(1e-9, self.cpu_seconds)


@dataclass(frozen=True, slots=True)
class TierComparison:
    ram_tokens: int
    disk_tokens: int
    results: tuple[TierResult, ...]
    """LRU on demand first, Belady last"""
    unbounded: float
    """hit ratio of a cache without bounds"""
    foreseeable: float
    """bound of the recall that fetching before a request arrives can have in this RAM"""

    def recall(self, result: TierResult) -> float:
        """Blocks that came ahead and were used, as a share of those that LRU lifts on demand."""
        return result.tally.used_blocks / max(1, self.results[0].tally.lifted_blocks)


def tier_lines(policy: str) -> tuple[tuple[str, Ahead], ...]:
    """What is compared."""
    mine = [(policy, ahead) for ahead in Ahead if (policy, ahead) != (LRU, Ahead.OFF)]
    if policy != "foresight":  # what does not learn expects nobody
        mine = [line for line in mine if line[1] is not Ahead.RETURNS]
    return ((LRU, Ahead.OFF), *mine, (BELADY, Ahead.OFF))


def compare_tiers(
    requests: Sequence[TraceRequest],
    ram_tokens: int,
    disk_tokens: int,
    policy: str,
    each: Callable[[str, Ahead], object] = lambda policy, ahead: None,
    typing_seconds: float = TYPING_SECONDS,
) -> TierComparison:
    """Replay the trace in every way; `each` is called after every request. Hints come `typing_seconds` before their turn."""
    hints = typing_hints(requests, typing_seconds)

    def results() -> Iterator[TierResult]:
        for name, ahead in tier_lines(policy):
            told = hints if ahead is Ahead.HINTS else ()
            replay = TwoTiers(ram_tokens, disk_tokens, _policy(name, requests), ahead, told)
            yield _played(replay, requests, name, ahead, each)

    found = tuple(results())
    bound = foreseeable(requests, ram_tokens)
    return TierComparison(ram_tokens, disk_tokens, found, unbounded_hit_ratio(requests), bound)


def _played(
    replay: TwoTiers, requests: Sequence[TraceRequest], policy: str, ahead: Ahead, each: Callable[[str, Ahead], object]
) -> TierResult:
    started = process_time()
    tally = replay.play(requests, lambda _: each(policy, ahead))
    return TierResult(policy, ahead, tally, process_time() - started)


def _policy(name: str, requests: Sequence[TraceRequest]) -> Callable[[Clock], PolicyMaker]:
    return (lambda _: belady(requests)) if name == BELADY else POLICIES[name]
