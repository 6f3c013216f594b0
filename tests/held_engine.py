"""A fake engine that stands still in a step until the test lets it go on."""

from __future__ import annotations

import threading

from pasture.core.values import PoolShape, StepPlan, StepResult
from pasture.engine.fake import FakeEngine

PATIENCE_SECONDS = 10.0


class HeldEngine(FakeEngine):
    """After `n_steps` steps that compute something, the next one waits."""

    def __init__(self, n_steps: int = 0, shape: PoolShape | None = None) -> None:
        super().__init__(shape or PoolShape(4096, 32))
        self._n_steps = n_steps
        self.held = threading.Event()
        self.go_on = threading.Event()

    def execute(self, plan: StepPlan) -> StepResult:
        if plan.works:
            self._n_steps -= 1
            if self._n_steps < 0 and not self.go_on.is_set():
                self.held.set()
                self.go_on.wait(PATIENCE_SECONDS)
        return super().execute(plan)
