"""The benchmark of the tiers: alternation, ratios, and the table that marks what got slower."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pasture.bench.options import BenchOptions, WorkloadName
from pasture.bench.tiers import SMALL_USERS, WITH, WITHOUT, Outcome, order, ratios, table
from pasture.bench.workloads import CROWDING, build, crowded_cells


def outcome(workload: str, side: str, wall_seconds: float, refusals: int = 0) -> Outcome:
    return Outcome(workload, side, wall_seconds, 0.5, 1000, 0, refusals)


RUNS = [
    *(outcome("team", WITHOUT, wall) for wall in (10.0, 30.0, 11.0)),
    *(outcome("team", WITH, wall) for wall in (11.0, 9.0, 12.0)),
    outcome("fast", WITHOUT, 1.0),
    outcome("fast", WITH, 1.5, refusals=7),
]


def shown(rows: list[Outcome]) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(table(rows))
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_ratios_are_of_medians() -> None:
    assert ratios(RUNS) == pytest.approx({"team": 1.0, "fast": 1.5})


def test_whoever_went_first_goes_second_next() -> None:
    assert order(0) == tuple(reversed(order(1))) == order(2)


def test_the_table_has_a_row_a_workload() -> None:
    text = shown(RUNS)
    assert "medians of alternated runs" in text
    assert "team 3" in text
    assert "1.00x" in text
    assert "1.50x" in text
    assert " 7 " in text


def test_every_workload_is_played() -> None:
    assert set(SMALL_USERS) == set(WorkloadName) - {WorkloadName.TRACE}


@pytest.mark.parametrize("users", [1, 6, 16])
def test_a_crowded_pool_has_room_for_a_quarter_or_one_conversation(users: int) -> None:
    workload = build(BenchOptions(workload=WorkloadName.CROWDED, users=users))
    cells = crowded_cells(workload)
    assert cells >= workload.longest_tokens
    assert cells % 256 == 0
    if users == 16:
        assert 3.0 < (workload.pool_tokens - 15 * 280) / cells < CROWDING + 0.5
