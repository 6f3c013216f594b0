"""How soon requests are followed up: hazard rates by class and age, learnt online.

A *wait* begins when a request leaves its blocks behind and ends when a later request goes on from them, or never. For each
class of waits, and each of a few dozen log-spaced ages, this counts the seconds that waits spent at that age and the returns
that came there; their quotient is the hazard. What has not returned yet counts with the seconds it has waited so far (censored,
not ignored), so the estimate is unbiased from the first minute on. Counts are halved now and then: old habits fade.

Little is known of a rare class, and at first of every class: each is drawn towards its group, and each group towards all,
scaled to how often it returns at all; and an age nobody has reached yet is expected to be worse than the one before it.

From the hazards follow P(return within t | age) and the *index* of an age: the best rate of returns per second of keeping that
any stopping time achieves (Gittins), which is what a block's second in the cache is worth. Constant memory; knows the past
only; belongs to its owner's thread. Sources: LHD (Beckmann et al., NSDI 2018) for hit density; Gittins (1979) for the index.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_FIRST_SECONDS = 2.0
_RATIO = 1.3
_LONGEST_SECONDS = 2 * 86400.0
PRIOR_RATE = 0.003
"""returns a second, before anything is known"""
PRIOR_RETURNS = 4.0
"""how many returns the average must have shown before it outweighs the guess above, at each age"""
CLASS_RETURNS = 8.0
"""and a class, before it outweighs its group, or a group all"""
FLAT_SECONDS = 60.0
FALL = 1.5
"""beyond FLAT_SECONDS the hazard of an age nobody knows falls with this power of the age"""
FADE_AFTER = 50_000
"""returns after which all counts are halved"""
OPEN_WAITS = 65_536
"""waits that are followed at the same time; the oldest are forgotten"""


def _edges() -> tuple[float, ...]:
    edges = [0.0, _FIRST_SECONDS]
    while edges[-1] < _LONGEST_SECONDS:
        edges.append(edges[-1] * _RATIO)
    return tuple(edges)


EDGES = _edges()
"""ages in seconds; bin `i` is `[EDGES[i], EDGES[i + 1])`"""
N_BINS = len(EDGES) - 1

Table = NDArray[np.float64]
_WIDTHS: Table = np.diff(np.array(EDGES))
_MIDDLES: Table = (np.array(EDGES[1:]) + np.array(EDGES[:-1])) / 2


def bin_of(age_seconds: float) -> int:
    return min(N_BINS - 1, max(0, bisect_right(EDGES, age_seconds) - 1))


@dataclass(slots=True, eq=False)
class Wait:
    """One wait. Its owner may change it until it begins, and then it changes here alone."""

    category: int
    since: float
    """seconds on the owner's clock"""
    over: bool = False


class Returns:
    """See the module. Categories are numbered from 0; `group_of` says which group each belongs to."""

    def __init__(self, group_of: Sequence[int]) -> None:
        n_categories = len(group_of)
        self._group_of = list(group_of)
        self._members: Table = np.array([[float(group == mine) for mine in group_of] for group in range(max(group_of) + 1)])
        self._events = np.zeros((n_categories, N_BINS))
        self._seconds = np.zeros((n_categories, N_BINS))
        self._open: list[deque[Wait]] = [deque() for _ in range(N_BINS)]
        """the waits at each age, oldest first: all of a bin entered it at the same age, so their order never changes"""
        self._n_open = 0
        self._n_returns = 0.0
        self._hazards: Table = np.zeros((n_categories, N_BINS))
        self._index: list[list[float]] = []
        self.refresh()

    def begin(self, wait: Wait) -> None:
        self._open[0].append(wait)
        self._n_open += 1
        if self._n_open > OPEN_WAITS:
            next(waits for waits in reversed(self._open) if waits).popleft()
            self._n_open -= 1

    def end(self, wait: Wait, now: float) -> None:
        """It returned. Does nothing for a wait that is over."""
        if wait.over:
            return
        wait.over = True
        age = now - wait.since
        at = bin_of(age)
        self._events[wait.category, at] += 1
        self._seconds[wait.category, at] += age - EDGES[at]
        self._n_returns += 1
        if self._n_returns > FADE_AFTER:
            self._n_returns /= 2
            self._events /= 2
            self._seconds /= 2

    def advance(self, now: float) -> None:
        """Count what open waits have waited. O(waits that grew into another age)."""
        for at in range(N_BINS - 1):
            waits, end = self._open[at], EDGES[at + 1]
            while waits and now - waits[0].since >= end:
                wait = waits.popleft()
                if wait.over:
                    self._n_open -= 1
                    continue
                self._seconds[wait.category, at] += end - EDGES[at]
                self._open[at + 1].append(wait)

    # What follows from the counts

    def refresh(self) -> None:
        """Draw the conclusions from what was counted: until then, answers are the old ones. About a millisecond."""
        members = self._members
        groups = _drawn(members @ self._events, members @ self._seconds, self._average()[None, :])
        self._hazards = _drawn(self._events, self._seconds, groups[self._group_of])
        self._index = _indices(self._hazards).tolist()

    @property
    def hazards(self) -> Table:
        """Returns a second, by category and age, at the last refresh."""
        return self._hazards

    def index(self, category: int, age_seconds: float) -> float:
        """Returns a second that keeping a wait of this age brings, until the best moment to let it go."""
        return self._index[category][bin_of(age_seconds)]

    def probability(self, category: int, age_seconds: float, within_seconds: float) -> float:
        """P(it returns within so many seconds | it has not by this age)."""
        lower = np.maximum(np.array(EDGES[:-1]), age_seconds)
        upper = np.minimum(np.array(EDGES[1:]), age_seconds + within_seconds)
        return -math.expm1(-float(self._hazards[category] @ np.maximum(upper - lower, 0)))

    def _average(self) -> Table:
        """The hazards of all categories together, left to right, each age starting from what the age before it suggests."""
        events, seconds = self._events.sum(axis=0), self._seconds.sum(axis=0)
        hazards = np.empty(N_BINS)
        before, middle = PRIOR_RATE, FLAT_SECONDS
        for at in range(N_BINS):
            expected = before * (middle / max(float(_MIDDLES[at]), FLAT_SECONDS)) ** FALL
            middle = max(float(_MIDDLES[at]), FLAT_SECONDS)
            hazards[at] = before = (events[at] + PRIOR_RETURNS) / (seconds[at] + PRIOR_RETURNS / expected)
        return hazards


def _drawn(events: Table, seconds: Table, towards: Table) -> Table:
    """Hazards of each row, drawn towards others that are scaled to how often the row returns at all."""
    scale = (events.sum(axis=1) + CLASS_RETURNS) / ((seconds * towards).sum(axis=1) + CLASS_RETURNS)
    prior = scale[:, None] * towards
    drawn: Table = (events + CLASS_RETURNS) / (seconds + CLASS_RETURNS / np.maximum(prior, 1e-12))
    return drawn


def _indices(hazards: Table) -> Table:
    """(categories, bins): at the start of each bin, max over its later edges of P(return) / E[seconds kept]."""
    passed = np.cumsum(np.pad(hazards * _WIDTHS, ((0, 0), (1, 0))), axis=1)
    alive = np.exp(-passed)
    """P(no return by an edge)"""
    kept = np.cumsum(np.pad((alive[:, :-1] - alive[:, 1:]) / hazards, ((0, 0), (1, 0))), axis=1)
    """E[seconds kept until an edge]"""
    returned = alive[:, :-1, None] - alive[:, None, 1:]
    seconds = kept[:, None, 1:] - kept[:, :-1, None]
    later = np.triu(np.ones((N_BINS, N_BINS), bool)) & (seconds > 1e-12)
    rates = np.where(later, returned / np.where(later, seconds, 1.0), 0.0)
    best: Table = np.maximum(rates.max(axis=2), 1e-12)
    return best
