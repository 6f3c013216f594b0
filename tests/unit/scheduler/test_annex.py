"""Prompts in the annex: when, what is learnt from it, and that nobody's answer changes."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from pasture.core.values import (
    Outcome,
    PoolShape,
    Request,
    RequestId,
    SamplingParams,
    SeqId,
    StepPlan,
    StepResult,
    Work,
)
from pasture.engine.fake import FakeEngine, expected_reply
from pasture.scheduler.costs import AnnexLoad, Load, StepCosts
from pasture.scheduler.scheduler import Scheduler
from pasture.scheduler.settings import SchedulerSettings
from pasture.scheduler.task import Task
from tests.store_support import still_store_for

SHAPE = PoolShape(16384, 64, n_batch=512, tile_tokens=64, can_pad=True, annex_cells=1024)
GREEDY = SamplingParams(temperature=0)
TILE_SECONDS, ROW_SECONDS, MASK_SECONDS, MOVE_SECONDS = 2e-3, 1e-3, 0.2e-6, 5e-6
"""what is true of the engine below: a tile's walk over 64 cells, a row, the mask of one cell for one row, a cell moved"""


class TimedEngine(FakeEngine):
    """Takes as long as llama.cpp's kernels on a CPU would, going by the plan."""

    def execute(self, plan: StepPlan) -> StepResult:
        used = self.used_cells
        result = super().execute(plan)
        if result.outcome is not Outcome.DONE:
            return result
        annexed = [work for work in plan.works if work.in_annex]
        pooled = [work for work in plan.works if not work.in_annex]
        there = sum(_seconds([work], work.start) for work in annexed)
        apart = _seconds(pooled[: plan.n_apart], used)
        here = _seconds(pooled[plan.n_apart :], used)
        moved = sum(work.start + len(work.tokens) for work in annexed)
        return replace(
            result,
            decode_seconds=there + apart + here,
            apart_seconds=apart,
            annex_seconds=there,
            moving_seconds=moved * MOVE_SECONDS,
        )


def _seconds(works: list[Work] | tuple[Work, ...], used: int) -> float:
    n_rows = sum(len(work.tokens) for work in works)
    walked = sum(-(-len(work.tokens) // 64) * (work.start + len(work.tokens)) / 64 for work in works)
    if n_rows < 64:
        return 3 * ROW_SECONDS * n_rows
    return ROW_SECONDS * n_rows + TILE_SECONDS * walked + MASK_SECONDS * n_rows * (used + n_rows)


def request(number: int, prompt: tuple[int, ...]) -> Request:
    return Request(RequestId(str(number)), prompt, 6, GREEDY, user=str(number))


@pytest.mark.parametrize("shape", [SHAPE, replace(SHAPE, annex_cells=0)])
def test_prompts_move_into_the_annex_as_the_pool_fills_up_and_every_answer_stays_what_it_is(shape: PoolShape) -> None:
    engine, rng, now = TimedEngine(shape), Random(2), 0.0
    scheduler = Scheduler(engine, SchedulerSettings(check_invariants=True), still_store_for(engine, 1 << 24), lambda: now)
    common = tuple(rng.randrange(256) for _ in range(100))
    prompts = [common + tuple(rng.randrange(256) for _ in range(rng.randrange(150, 1300))) for _ in range(60)]
    replies: dict[str, list[int]] = {}
    used_in_pool: list[int] = []
    used_in_annex: list[int] = []
    for wave in range(0, len(prompts), 6):
        for number in range(wave, wave + 6):
            scheduler.submit(Task(request(number, prompts[number]), now, lambda: False))
        while scheduler.busy:
            plan = scheduler.schedule()
            result = engine.execute(plan)
            now += result.decode_seconds + result.moving_seconds + 1e-4
            assert result.outcome is Outcome.DONE
            for work in plan.works:
                assert not work.in_annex or len(work.tokens) >= 64, "no rest is left that would have to be filled up"
                if len(work.tokens) >= 128 and work.start + len(work.tokens) <= shape.annex_cells:
                    (used_in_annex if work.in_annex else used_in_pool).append(scheduler.pool.used_cells)
            for task, event in scheduler.commit(plan, result):
                if event.token is not None:
                    replies.setdefault(task.request.request_id, []).append(event.token)
    assert replies == {str(number): expected_reply(prompt, 6, GREEDY) for number, prompt in enumerate(prompts)}
    rows = Load(6, 0, 6 * 900, 6 * 900, 0, 12000)
    assert scheduler.shaper.costs.expected_seconds(shape, rows) == pytest.approx(18 * ROW_SECONDS, rel=0.2)
    if not shape.annex_cells:
        assert not used_in_annex
        return
    assert max(used_in_pool) < 4000  # once it has been seen what a full pool costs
    assert min(used_in_annex) > 500
    assert max(used_in_annex) > 12000


def test_what_is_learnt_of_one_cache_holds_for_the_other() -> None:
    costs, rng = StepCosts(0.4), Random(3)
    for _ in range(200):
        n, start, used = rng.randrange(64, 512), rng.randrange(512), rng.randrange(512, 16000)
        pooled, annexed = Work(SeqId(0), [0] * n, start, None), AnnexLoad(n, start)
        load = Load(0, n, start * n, start + n, start + n, used + n)
        costs.observe(SHAPE, load, 0, _seconds([pooled], used))
        costs.observe_annex(SHAPE, [annexed, annexed], 2 * _seconds([pooled], start), 2 * (start + n) * MOVE_SECONDS)
    work = Work(SeqId(0), [0] * 256, 300, None)
    expected = costs.expected_seconds(SHAPE, Load(0, 256, 300 * 256, 556, 556, 10256))
    assert expected == pytest.approx(_seconds([work], 10000), rel=0.1)
    assert costs.annex_seconds(SHAPE, AnnexLoad(256, 300)) == pytest.approx(_seconds([work], 300) + 556 * MOVE_SECONDS, rel=0.1)


def test_moving_is_a_part_of_what_it_takes() -> None:
    costs, rng, slow = StepCosts(0.4), Random(4), 1e-3
    for _ in range(100):
        load = AnnexLoad(rng.randrange(64, 512), rng.randrange(512))
        seconds = _seconds([Work(SeqId(0), [0] * load.n_tokens, load.start, None)], load.start)
        costs.observe_annex(SHAPE, [load], seconds, (load.start + load.n_tokens) * slow)
    work = Work(SeqId(0), [0] * 256, 300, None)
    assert costs.annex_seconds(SHAPE, AnnexLoad(256, 300)) == pytest.approx(_seconds([work], 300) + 556 * slow, rel=0.1)


def test_the_annex_takes_nothing_that_is_longer_than_it_is() -> None:
    costs, nobody = StepCosts(1000.0), Load(0, 0, 0, 0, 0)
    assert costs.step(SHAPE, nobody, Load(0, 1, 800, 800, 800, 1 << 20)) == 192
    assert costs.step(SHAPE, nobody, Load(0, 1, 990, 990, 990, 1 << 20)) == SHAPE.n_batch


def test_cells_for_works_in_the_annex_are_counted_beside_rows_that_fill_up() -> None:
    works = (Work(SeqId(0), [1], 5, None), Work(SeqId(1), [1] * 10, 0, None), Work(SeqId(2), [1] * 30, 0, None, in_annex=True))
    assert StepPlan((), works).n_cells == 41
    assert StepPlan((), works, pad_to=64).n_cells == 64 + 30
    assert StepPlan((), works, n_apart=1, pad_to=64).n_cells == 1 + 64 + 30


def test_an_engine_without_an_annex_refuses_the_plan() -> None:
    engine = FakeEngine(PoolShape(512, 4))
    with pytest.raises(Exception, match="does not fit into an annex of 0 cells"):
        engine.execute(StepPlan((), (Work(SeqId(0), [1], 0, None, in_annex=True),)))
