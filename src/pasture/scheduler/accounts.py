"""What the scheduler counts from its start on: requests, tokens, and the engine thread's seconds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from pasture.core.values import FinishReason, Outcome, StepResult


@dataclass(slots=True)
class Accounts:
    submitted: int = 0
    finished: Counter[FinishReason] = field(default_factory=Counter)
    swaps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    """prompt tokens put through the model"""
    generated_tokens: int = 0
    steps: int = 0
    interrupted_steps: int = 0
    step_seconds: float = 0.0
    decode_seconds: float = 0.0
    sample_seconds: float = 0.0
    layout_moves: int = 0
    shifts: int = 0
    """of the live cells to another form"""
    invariant_failures: int = 0

    def record_step(self, seconds: float, result: StepResult) -> None:
        """The engine thread's time for one step, from the look into the inbox to the last event handed out."""
        self.steps += 1
        self.interrupted_steps += result.outcome is Outcome.INTERRUPTED
        self.step_seconds += seconds
        self.decode_seconds += result.decode_seconds
        self.sample_seconds += result.sample_seconds
