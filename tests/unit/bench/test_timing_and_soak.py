"""What `bench timing` and `bench soak` make of what they measured."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from pasture.bench.soak import KEPT_FILES, Soaked, Standing, growth
from pasture.bench.timing import Probe, area, standard_error, tells

NOTHING = Standing(0, 0, 0, 0, 0, 30, 100 << 20)
RUN = Soaked(10, 0, 20, 1.0, NOTHING, NOTHING, NOTHING, 1.0, 0.0)


def probes(cached: list[float], cold: list[float]) -> list[Probe]:
    return [Probe(True, t, 0) for t in cached] + [Probe(False, t, 0) for t in cold]


def test_the_area_is_how_often_a_cached_prompt_was_faster() -> None:
    assert area(probes([1, 2], [3, 4])) == 1.0
    assert area(probes([3, 4], [1, 2])) == 0.0
    assert area(probes([1, 4], [2, 3])) == 0.5
    assert area(probes([1, 1], [1, 1])) == 0.5
    assert area(probes([1, 3], [2, 4])) == 0.75


def test_somebody_who_guesses_is_within_a_few_standard_errors() -> None:
    random = Random(1)
    found = probes([random.random() for _ in range(200)], [random.random() for _ in range(200)])
    assert standard_error(found) == pytest.approx(0.0289, abs=1e-4)
    assert abs(area(found) - 0.5) < 3 * standard_error(found)


def test_tokens_that_were_found_tell_only_where_there_are_more_of_them() -> None:
    assert not tells([Probe(True, 1.0, 4), Probe(False, 1.0, 4)])
    assert tells([Probe(True, 1.0, 5), Probe(False, 1.0, 4)])


def test_growth_is_from_the_second_quarter_to_the_last() -> None:
    assert growth([1, 50, 100, 100, 100, 100, 110, 110]) == pytest.approx(0.1)
    assert growth([90, 90, 100, 100, 100, 100, 100, 100]) == 0.0
    assert growth([1, 2]) == 0.0


@pytest.mark.parametrize("left", ["cells", "ram_bytes", "disk_bytes", "sessions", "turns", "open_files"])
def test_whatever_stays_behind_is_noticed(left: str) -> None:
    assert RUN.clean
    assert not replace(RUN, after=replace(NOTHING, **{left: 31 + KEPT_FILES})).clean


def test_connections_that_are_kept_for_the_next_use_are_no_leak() -> None:
    assert replace(RUN, after=replace(NOTHING, open_files=30 + KEPT_FILES)).clean


def test_memory_may_stay_but_not_grow() -> None:
    assert replace(RUN, after=replace(NOTHING, resident_bytes=200 << 20)).clean
    assert not replace(RUN, growth=0.06).clean
