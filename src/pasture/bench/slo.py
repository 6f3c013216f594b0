"""The largest number of users that a system serves inside a service level, found by bisection.

Owns the search and the judgement of one run. A run with an error is outside every service level, and one that cannot keep a
limit any more, however the rest of it goes, need not go on: runs far outside would take the longest. The search doubles the
users until a run is outside, then halves the interval down to an eighth of what is inside; it assumes that more users are never
better off, and so needs about log2(n) + 3 runs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from pasture.bench.client import Exchange
from pasture.bench.measure import Figures
from pasture.bench.options import Limit

PRECISION = 1 / 8
"""of the answer"""


def within(figures: Figures, limits: Sequence[Limit]) -> bool:
    """Whether a run has no errors and keeps every limit."""
    if figures.errors or not figures.requests:
        return False
    levels = [(figures.level(limit.name), limit.seconds) for limit in limits]
    return all(level is not None and level <= seconds for level, seconds in levels)


class Outlook:
    """Whether a run can still keep its limits, from the requests that have ended."""

    def __init__(self, limits: Sequence[Limit], n_requests: int) -> None:
        self._limits = limits
        self._n_requests = n_requests
        self._ended: list[Exchange] = []

    def lost(self, exchange: Exchange) -> bool:
        """One more has ended; True from when on the run is outside for certain."""
        self._ended.append(exchange)
        return exchange.error is not None or any(self._broken(limit) for limit in self._limits)

    def _broken(self, limit: Limit) -> bool:
        kind, _, figure = limit.name.partition("_")
        if limit.name == "wall":
            return max(e.ended for e in self._ended) - min(e.sent for e in self._ended) > limit.seconds
        if limit.name == "itl_max":
            return any(gap > limit.seconds for gap in self._ended[-1].gaps_seconds)
        if kind not in ("ttft", "latency"):
            return False  # how many gaps there will be is not known before the end
        values = [e.ttft_seconds if kind == "ttft" else e.latency_seconds for e in self._ended]
        if figure == "mean":
            return sum(values) > limit.seconds * self._n_requests
        rank = int(int(figure.removeprefix("p")) / 100 * (self._n_requests - 1))
        return sum(value > limit.seconds for value in values) >= self._n_requests - rank


async def largest(holds: Callable[[int], Awaitable[bool]], ceiling: int) -> int:
    """The largest n in `[0, ceiling]` that holds, given that everything below one that holds does too; 0: not even one.

    Above `1 / PRECISION` it may be less than the largest, by at most that share of it.
    """
    good, candidate = 0, 1
    while await holds(candidate):
        good = candidate
        if candidate == ceiling:
            return good
        candidate = min(candidate * 2, ceiling)
    bad = candidate
    while bad - good > max(1, good * PRECISION):
        middle = (good + bad) // 2
        if await holds(middle):
            good = middle
        else:
            bad = middle
    return good
