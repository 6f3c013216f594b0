"""Prefill ahead of time: prompts that will probably be asked for, computed while nobody asks for anything.

    anticipate()  ->  a short list, newest first        next()  ->  one tile of the first prompt, as a step of its own
                                                        give_way()  ->  somebody asks: what is computed so far stays, idle

A wrong guess costs nothing that anybody sees: a step is one tile, it never runs beside a request, and what it leaves behind is
an idle sequence like any other, the first to go when room is needed. Owns at most one running sequence. Engine thread.
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass

from pasture.core.values import Namespace, Outcome, RequestId, StepPlan, StepResult, Work
from pasture.kv.pool import Pool
from pasture.kv.sequence import Sequence
from pasture.scheduler.resting import Resting

MAX_ANTICIPATED = 64
"""prompts on the list; the oldest are forgotten"""
MIN_STEP_TOKENS = 64
"""of one step where the engine has no tiles"""
MIN_MISSING_TOKENS = 16
"""fewer are computed along with the next prompt"""
_NOBODY = RequestId("ahead")


@dataclass(frozen=True, slots=True)
class _Prompt:
    namespace: Namespace
    tokens: array[int]


class Ahead:
    def __init__(self, pool: Pool, resting: Resting) -> None:
        self._pool = pool
        self._resting = resting
        self._prompts: deque[_Prompt] = deque(maxlen=MAX_ANTICIPATED)
        self._sequence: Sequence | None = None
        """of the newest prompt, while it is being computed"""
        self.computed_tokens = 0

    @property
    def waiting(self) -> bool:
        return bool(self._prompts)

    def anticipate(self, namespace: Namespace, tokens: array[int]) -> None:
        """Compute these tokens when there is time; they should be the beginning of somebody's next prompt."""
        missing = len(tokens) - self._pool.lookup(namespace, tokens)
        if self._pool.shares and missing >= MIN_MISSING_TOKENS and len(tokens) < self._pool.shape.cells_per_sequence:
            self.give_way()
            self._prompts.append(_Prompt(namespace, tokens))

    def next(self) -> StepPlan | None:
        """A step for the newest prompt; None when nothing is left to compute."""
        while self._prompts:
            prompt = self._prompts[-1]
            if self._sequence is None:
                self._sequence = self._enter(prompt)
            sequence = self._sequence
            if sequence is None or sequence.length >= len(prompt.tokens):
                self._leave()
                continue
            shape = self._pool.shape
            n = min(max(MIN_STEP_TOKENS, shape.tile_tokens), shape.n_batch, len(prompt.tokens) - sequence.length)
            if not self._pool.make_room(n):
                self._leave()
                continue
            start = sequence.length
            work = Work(sequence.id, prompt.tokens[start : start + n], start, None)
            return StepPlan(self._pool.operations(), (work,))
        return None

    def book(self, plan: StepPlan, result: StepResult) -> None:
        """The step of `next` has run."""
        sequence, (work,) = self._sequence, plan.works
        assert sequence is not None
        if result.outcome is Outcome.DONE:
            self._pool.extend(sequence, array("i", work.tokens))
            self.computed_tokens += len(work.tokens)
        elif sequence.id in result.lost:
            self._pool.lose(sequence)
            self._sequence = None
            self._prompts.pop()
        else:
            self._leave()

    def give_way(self) -> None:
        """Somebody asks for something: what is computed stays as an idle sequence, the rest may be computed later."""
        if self._sequence is not None:
            self._pool.finish(self._sequence)
            self._sequence = None

    def forget(self) -> None:
        """The live cache was emptied."""
        self._prompts.clear()
        self._sequence = None

    def _enter(self, prompt: _Prompt) -> Sequence | None:
        sequence = self._pool.join(prompt.namespace, prompt.tokens, _NOBODY)
        if sequence is not None and self._pool.cuttable:
            self._resting.restore(sequence, prompt.tokens[:-1])
        return sequence

    def _leave(self) -> None:
        """Done with the newest prompt, one way or another."""
        self.give_way()
        self._prompts.pop()
