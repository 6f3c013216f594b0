"""Steps that are put together in a full pool."""

from __future__ import annotations

from random import Random

import pytest

from pasture.core.values import Outcome, PoolShape, Request, RequestId, SamplingParams, StepPlan
from pasture.engine.fake import FakeEngine
from pasture.scheduler.costs import Load, StepCosts
from pasture.scheduler.scheduler import Scheduler
from pasture.scheduler.settings import SchedulerSettings
from pasture.scheduler.shaping import StepShaper
from pasture.scheduler.task import Task
from tests.store_support import still_store_for

N_REQUESTS = 60


def test_rows_that_fill_a_step_up_find_room_beside_streams_in_a_batch_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the engine refuses the step, idle conversations are lost, and everybody is computed one by one."""
    shape = PoolShape(512, 32, tile_tokens=64, can_pad=True)

    def padding(_: StepCosts, shape: PoolShape, load: Load) -> int:
        return shape.tile_tokens if 1 < load.n_tokens < shape.tile_tokens else 0

    monkeypatch.setattr(StepCosts, "padding", padding)
    monkeypatch.setattr(StepShaper, "_are_better_apart", lambda _, works, n_streams: 0 < n_streams < len(works))
    engine, rng, now = FakeEngine(shape), Random(1), 0.0
    scheduler = Scheduler(engine, SchedulerSettings(check_invariants=True), still_store_for(engine, 1 << 20), lambda: now)
    plans: list[StepPlan] = []
    for number in range(N_REQUESTS):
        prompt = tuple(rng.randrange(1000) for _ in range(rng.randrange(20, 150)))
        request = Request(RequestId(str(number)), prompt, 8, SamplingParams(temperature=0), user=str(number))
        scheduler.submit(Task(request, now, lambda: False))
    while scheduler.busy:
        plan, now = scheduler.schedule(), now + 0.1
        result = engine.execute(plan)
        assert result.outcome is Outcome.DONE
        scheduler.commit(plan, result)
        plans.append(plan)
    assert any(plan.n_apart and plan.pad_to for plan in plans)
