"""The rates of `pasture check`, on an engine whose steps cost what the test says."""

from __future__ import annotations

import pytest

from pasture.core.errors import EngineError
from pasture.core.values import Outcome, PoolShape, StepPlan, StepResult
from pasture.engine.fake import FakeEngine
from pasture.engine.rates import DECODE_SEQUENCES, N_MEASURES, PREFILL_TOKENS, WARM_UP_TOKENS, measure


class TimedEngine(FakeEngine):
    """A clock that advances with the tokens and the steps computed."""

    def __init__(self, shape: PoolShape, token_seconds: float, step_seconds: float) -> None:
        super().__init__(shape)
        self.now = 0.0
        self.longest_step_tokens = 0
        self._token_seconds = token_seconds
        self._step_seconds = step_seconds

    def execute(self, plan: StepPlan) -> StepResult:
        if plan.works:
            self.now += self._step_seconds + plan.n_tokens * self._token_seconds
            self.longest_step_tokens = max(self.longest_step_tokens, plan.n_tokens)
        return super().execute(plan)


def test_rates_are_tokens_over_time() -> None:
    engine = TimedEngine(PoolShape(4096, 8), token_seconds=0.001, step_seconds=0.0)
    labels: list[str] = []
    rates = measure(engine, labels.append, lambda: engine.now)
    assert rates.prefill_tokens_per_second == pytest.approx(1000)
    assert [rate.sequences for rate in rates.decode] == list(DECODE_SEQUENCES)
    assert [rate.tokens_per_second for rate in rates.decode] == pytest.approx([1000, 1000])
    assert engine.longest_step_tokens == PREFILL_TOKENS
    assert len(labels) == N_MEASURES
    assert engine.used_cells == 0, "everything is given back"


def test_a_slow_model_is_measured_on_less() -> None:
    engine = TimedEngine(PoolShape(4096, 8), token_seconds=0.5, step_seconds=0.5)
    rates = measure(engine, lambda _: None, lambda: engine.now)
    assert engine.longest_step_tokens == WARM_UP_TOKENS
    assert rates.prefill_tokens_per_second == pytest.approx(WARM_UP_TOKENS / (0.5 * WARM_UP_TOKENS + 0.5))
    assert rates.decode[0].step_seconds == pytest.approx(1.0)


def test_a_small_pool_is_not_asked_for_more_than_it_holds() -> None:
    engine = TimedEngine(PoolShape(256, 2), token_seconds=0.001, step_seconds=0.0)
    rates = measure(engine, lambda _: None, lambda: engine.now)
    assert [rate.sequences for rate in rates.decode] == [1]


def test_a_step_that_fails_is_an_error() -> None:
    engine = TimedEngine(PoolShape(4096, 8), token_seconds=0.001, step_seconds=0.0)
    engine.fail_next(Outcome.FAILED)
    with pytest.raises(EngineError, match="ended with 'failed'"):
        measure(engine, lambda _: None, lambda: engine.now)
