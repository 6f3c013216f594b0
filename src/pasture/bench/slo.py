"""The largest number of users that a system serves inside a service level, found by bisection.

Owns the search and the judgement of one run. A run with an error is outside every service level. The search doubles the users
until a run is outside, then halves the interval; it assumes that more users are never better off, and so needs about 2
log2(n) runs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from pasture.bench.measure import Figures
from pasture.bench.options import Limit


def within(figures: Figures, limits: Sequence[Limit]) -> bool:
    """Whether a run has no errors and keeps every limit."""
    if figures.errors or not figures.requests:
        return False
    levels = [(figures.level(limit.name), limit.seconds) for limit in limits]
    return all(level is not None and level <= seconds for level, seconds in levels)


async def largest(holds: Callable[[int], Awaitable[bool]], ceiling: int) -> int:
    """The largest n in `[0, ceiling]` that holds, given that everything below one that holds does too; 0: not even one."""
    good, candidate = 0, 1
    while await holds(candidate):
        good = candidate
        if candidate == ceiling:
            return good
        candidate = min(candidate * 2, ceiling)
    bad = candidate
    while bad - good > 1:
        middle = (good + bad) // 2
        if await holds(middle):
            good = middle
        else:
            bad = middle
    return good
