"""What `bench shift` makes of an engine whose rebuilds take as long as the test says."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
from rich.console import Console

from pasture.bench.shifting import N_COMPUTED, N_TOKENS, REPLY_TOKENS, USER_CELLS, Shifted, measure
from pasture.cli.shift import table
from pasture.core.errors import EngineError
from pasture.core.values import Form, Layout, PoolShape, Segment
from pasture.engine.fake import FakeEngine

DOWN_SECONDS, BACK_SECONDS = 0.4, 0.6


class TimedEngine(FakeEngine):
    """A clock that advances with every rebuild."""

    now = 0.0
    longest_cells = 0

    def rebuild(self, segments: Sequence[Segment], layout: Layout, n_seqs: int, form: Form | None = None) -> PoolShape:
        self.longest_cells = max(self.longest_cells, self.used_cells)
        self.now += BACK_SECONDS if form is Form.RAW else DOWN_SECONDS
        return super().rebuild(segments, layout, n_seqs, form)


def test_a_full_cache_is_shifted_down_and_back() -> None:
    engine = TimedEngine(PoolShape(4 * USER_CELLS, 64))
    progress: list[None] = []
    found = measure(engine, 1, 2, lambda: progress.append(None), lambda: engine.now)
    assert (found.cells_raw, found.users_raw, found.used_cells) == (4 * USER_CELLS, 4, 4 * N_TOKENS)
    assert found.users_down == found.cells_down // USER_CELLS > 6
    for each in found.rounds:
        assert (each.down_seconds, each.back_seconds) == pytest.approx((DOWN_SECONDS, BACK_SECONDS))
        assert (each.agreeing_down, each.agreeing_back) == (REPLY_TOKENS, REPLY_TOKENS)
    assert engine.longest_cells == 4 * N_TOKENS, "nobody shares a cell, and who came later has gone before the way back"
    assert (engine.used_cells, engine.shape.form) == (0, Form.RAW)
    assert len(progress) == N_COMPUTED + 2
    console = Console(file=io.StringIO(), width=160)
    console.print(table(found))
    text = str(console.file.getvalue())  # type: ignore[attr-defined]
    for said in ("4,096 cells", "4,000 of them", "0.40 s", "0.60 s", f"4 and {found.users_down}"):
        assert said in text


def test_what_the_annex_took_is_the_pools_while_it_is_shifted_down() -> None:
    engine = TimedEngine(PoolShape(4 * USER_CELLS, 64, annex_cells=USER_CELLS))
    found = measure(engine, 1, 1, lambda: None, lambda: engine.now)
    assert (found.cells_raw, found.annex_cells) == (4 * USER_CELLS, USER_CELLS)
    assert found.cells_down == 5 * USER_CELLS * 64 // 34
    assert found.users_down > 2 * found.users_raw
    assert (engine.shape.n_cells, engine.shape.annex_cells) == (4 * USER_CELLS, USER_CELLS)
    console = Console(file=io.StringIO(), width=160)
    console.print(table(found))
    assert "1,024 and 0" in str(console.file.getvalue())  # type: ignore[attr-defined]


def test_a_reply_that_parts_is_told() -> None:
    class Rounding(TimedEngine):
        """Its cells are not what they were, once they have been written smaller."""

        def rebuild(self, segments: Sequence[Segment], layout: Layout, n_seqs: int, form: Form | None = None) -> PoolShape:
            shape = super().rebuild(segments, layout, n_seqs, form)
            self._sums = {sequence: total + 1 for sequence, total in self._sums.items()}
            return shape

    engine = Rounding(PoolShape(2 * USER_CELLS, 64))
    [each] = measure(engine, 1, 1, lambda: None, lambda: engine.now).rounds
    assert each.agreeing_down < REPLY_TOKENS
    assert isinstance(each, Shifted)


def test_an_engine_that_is_too_small_or_cannot_shift_says_so() -> None:
    with pytest.raises(EngineError, match=f"a user takes {USER_CELLS} cells"):
        measure(FakeEngine(PoolShape(512, 8)), 1, 1, lambda: None)
    with pytest.raises(EngineError, match="running states"):
        measure(FakeEngine(PoolShape(2 * USER_CELLS, 8), recurrent=True), 1, 1, lambda: None)
