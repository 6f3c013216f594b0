"""What is measured before the first request: costs and gate know the machine, the cache is empty, an engine may fail."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import pytest

from pasture.core.values import Layout, Outcome, PoolShape, Request, RequestId, SamplingParams, StepPlan, StepResult
from pasture.engine.fake import FakeEngine, expected_reply
from pasture.scheduler.costs import StepCosts
from pasture.scheduler.rehearsal import PROMPT_TOKENS, WARM_UP_TOKENS, rehearse
from pasture.scheduler.service import LocalService
from pasture.scheduler.settings import SchedulerSettings
from pasture.tiers.gate import CostGate
from tests.store_support import store_for

SHAPE = PoolShape(1024, 8)
SECONDS_A_TOKEN = 0.002
MOVE_SECONDS = 0.0005
"""of a token, which is more than it is worth"""
PROMPT = tuple(b"Sixteen sheep and a dog")
GREEDY = SamplingParams(temperature=0)


class Timed(FakeEngine):
    """Says what its steps take."""

    def __init__(self, shape: PoolShape = SHAPE, *, recurrent: bool = False) -> None:
        super().__init__(shape, recurrent=recurrent)
        self.transfer_seconds = MOVE_SECONDS

    def execute(self, plan: StepPlan) -> StepResult:
        return replace(super().execute(plan), decode_seconds=SECONDS_A_TOKEN * plan.n_tokens)


def rehearsed(engine: FakeEngine) -> tuple[StepCosts, CostGate]:
    costs, gate = StepCosts(0.4), CostGate(engine.model.cell_bytes)
    rehearse(engine, costs, gate)
    return costs, gate


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("shape", [SHAPE, replace(SHAPE, layout=Layout.STREAMS), PoolShape(32, 2)])
def test_steps_and_transfers_are_known_and_nothing_is_left(shape: PoolShape, recurrent: bool) -> None:
    engine = Timed(shape, recurrent=recurrent)
    costs, gate = rehearsed(engine)
    assert costs.tokens_per_second == pytest.approx(1 / SECONDS_A_TOKEN)
    assert gate.figures().prefill_tokens_per_second == costs.tokens_per_second
    figures, slowest = gate.figures(), engine.model.cell_bytes / MOVE_SECONDS
    for rate in (figures.save_bytes_per_second, figures.restore_bytes_per_second):
        assert slowest < rate < 6 * slowest, "what was assumed does not count for more than what was seen"
    assert engine.used_cells == 0
    assert engine.n_computed <= WARM_UP_TOKENS + PROMPT_TOKENS


def test_where_moving_loses_the_gate_is_closed_from_the_start() -> None:
    engine = Timed()
    engine.transfer_seconds = 10 * SECONDS_A_TOKEN
    _, gate = rehearsed(engine)
    assert not gate.spill(500)
    assert CostGate(engine.model.cell_bytes).spill(500), "which is what would have been assumed"


def test_a_very_slow_model_computes_no_more_than_the_warm_up() -> None:
    engine, times = Timed(), iter([0.0, 60.0])
    rehearse(engine, StepCosts(0.4), CostGate(), clock=lambda: next(times))
    assert engine.n_computed == WARM_UP_TOKENS


@pytest.mark.parametrize("outcomes", [(), (Outcome.FAILED,), (Outcome.DONE, Outcome.NO_ROOM)])
async def test_requests_are_served_after_it_however_it_went(outcomes: tuple[Outcome, ...]) -> None:
    engine = Timed()
    engine.fail_next(*outcomes)
    settings = SchedulerSettings(rehearse=True, check_invariants=True)
    with closing(LocalService(engine, store_for(engine), settings)) as service:
        assert outcomes or engine.n_computed > WARM_UP_TOKENS, "before anybody has asked"
        assert engine.used_cells == 0
        events = [event async for event in service.generate(Request(RequestId("first"), PROMPT, 10, GREEDY))]
        await service.verify()
    assert [event.token for event in events if event.token is not None] == expected_reply(PROMPT, 10, GREEDY)
