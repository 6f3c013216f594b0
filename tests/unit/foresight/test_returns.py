"""Hazards and the index against processes whose answers are known."""

from __future__ import annotations

import math
import random

import pytest

from pasture.foresight.returns import EDGES, N_BINS, OPEN_WAITS, PRIOR_RATE, Returns, Wait, bin_of


def watch(returns: Returns, lengths: list[float], category: int = 0, *, start: float = 0.0, every: float = 10.0) -> float:
    """Waits that begin one after the other and return after so many seconds (infinite: never); the time it is then."""
    endings: list[tuple[float, Wait]] = []
    now = start
    for number, length in enumerate(lengths):
        now = start + number * every
        for ending in sorted((e for e in endings if e[0] <= now), key=lambda e: e[0]):
            returns.advance(ending[0])
            returns.end(ending[1], ending[0])
            endings.remove(ending)
        returns.advance(now)
        wait = Wait(category, now)
        returns.begin(wait)
        if math.isfinite(length):
            endings.append((now + length, wait))
    returns.advance(now)
    returns.refresh()
    return now


def test_bins_cover_every_age() -> None:
    assert [bin_of(edge) for edge in EDGES[:-1]] == list(range(N_BINS))
    assert bin_of(-1.0) == 0
    assert bin_of(1e12) == N_BINS - 1


def test_before_anything_is_known_there_is_a_modest_guess_that_falls_with_age() -> None:
    returns = Returns([0, 0])
    young = returns.probability(0, 0.0, 60.0)
    assert young == pytest.approx(1 - math.exp(-60 * PRIOR_RATE), rel=0.3)
    assert returns.probability(0, 3600.0, 60.0) < young / 10
    assert returns.index(0, 3600.0) < returns.index(0, 0.0)


def test_a_constant_rate_is_found_and_age_says_nothing() -> None:
    rng = random.Random(1)
    returns = Returns([0])
    watch(returns, [rng.expovariate(1 / 50) for _ in range(3000)])
    for age in (0.0, 20.0, 60.0):
        assert returns.probability(0, age, 50.0) == pytest.approx(1 - math.exp(-1), abs=0.06)
        assert returns.index(0, age) == pytest.approx(1 / 50, rel=0.3)


def test_waits_that_have_not_returned_count_with_what_they_have_waited() -> None:
    returns = Returns([0])
    watch(returns, [30.0 if number % 4 == 0 else math.inf for number in range(2000)])
    assert returns.probability(0, 0.0, 60.0) == pytest.approx(0.25, abs=0.05)
    assert returns.probability(0, 120.0, 600.0) < 0.05


def test_the_index_looks_ahead_to_the_moment_of_return() -> None:
    returns = Returns([0])
    watch(returns, [100.0] * 2000)
    just_before = EDGES[bin_of(100.0)]
    assert returns.index(0, 0.0) == pytest.approx(1 / 100, rel=0.25), "worth the whole wait, although nothing returns at once"
    assert returns.index(0, just_before) > 3 * returns.index(0, 0.0)
    assert returns.index(0, 300.0) < returns.index(0, just_before) / 5


def test_categories_are_told_apart_and_rare_ones_lean_on_the_others() -> None:
    returns = Returns([0, 1, 2, 0])
    now = watch(returns, [20.0] * 500, category=0)
    watch(returns, [math.inf] * 500, category=1, start=now)
    assert returns.probability(0, 0.0, 60.0) > 0.7
    assert returns.probability(1, 0.0, 60.0) < 0.15
    unknown, unknown_of_group = returns.probability(2, 0.0, 60.0), returns.probability(3, 0.0, 60.0)
    assert returns.probability(1, 0.0, 60.0) < unknown < unknown_of_group, "its group says more than all do"


def test_a_wait_ends_once() -> None:
    returns = Returns([0])
    wait = Wait(0, 500.0)
    returns.begin(wait)
    returns.advance(520.0)
    returns.end(wait, 520.0)
    returns.end(wait, 521.0)
    assert wait.over
    assert returns._events.sum() == 1
    assert returns._events[0, bin_of(20.0)] == 1
    assert returns._seconds.sum() < 540


def test_memory_is_bounded() -> None:
    returns = Returns([0])
    for number in range(OPEN_WAITS + 500):
        returns.begin(Wait(0, float(number)))
    assert sum(map(len, returns._open)) == OPEN_WAITS
