"""What `bench neighbours` and `bench forks` make of what they measured."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from pasture.bench import forks, neighbours
from pasture.bench.forks import Forked
from pasture.bench.neighbours import Phase

PHASES = [Phase("alone", 40, 0.5, 1.0, 0, 0), Phase("share", 40, 0.6, 2.0, 6, 0), Phase("greedy", 38, 0.7, 2.5, 90, 1)]


def shown(table: Table) -> str:
    out = io.StringIO()
    Console(file=out, width=120).print(table)
    return out.getvalue()


def test_what_counts_is_the_p95_beside_a_greedy_tenant_to_that_beside_one_that_keeps_to_its_share() -> None:
    assert neighbours.ratio(PHASES) == pytest.approx(1.25)
    text = shown(neighbours.table(PHASES))
    assert "1.25x" in text
    assert "wanted: at most 1.3x" in text


def test_forks_show_the_median_call_and_the_cells() -> None:
    found = Forked(1900, (0.004, 0.006, 0.09), 0, 12.0, 1890, 900)
    text = shown(forks.table(found))
    assert "6 ms" in text
    assert "90 ms" in text
    assert "1,890 tokens" in text
