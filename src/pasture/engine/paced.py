"""The fake engine at the pace of a real one: every step takes as long as it is told, asleep, with no processor busy.

For measuring what is around an engine where several of them share a machine: two that sleep do not slow each other down, as two
machines would not. What it answers is the fake engine's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from pasture.core.values import PoolShape, StepPlan, StepResult
from pasture.engine.fake import FakeEngine


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds, 0 or more."""

    step_seconds: float
    """of a step, however little it computes"""
    token_seconds: float
    """of each token beyond a sequence's first: what prompts are made of"""


class PacedEngine(FakeEngine):
    def __init__(self, shape: PoolShape, pace: Pace) -> None:
        super().__init__(shape)
        self._pace = pace

    def execute(self, plan: StepPlan) -> StepResult:
        if plan.works:
            time.sleep(self._pace.step_seconds + (plan.n_tokens - len(plan.works)) * self._pace.token_seconds)
        return super().execute(plan)
