"""What a step, a save and a restore take on this machine, measured before the first request.

    warm up ─► a prompt of a tile ─► its KV out and in, twice ─► the cache is empty again

Otherwise the first steps would be shaped, and the first transfers decided, by guesses. The costs of steps and the store's gate
learn from it as from any other step. Of what is done twice only the second counts: the first also allocates. Takes a few
tenths of a second with a small model. Engine thread, while nobody holds a cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Protocol

from pasture.core.errors import EngineError
from pasture.core.ports import Clock, Engine
from pasture.core.values import Layout, Outcome, Remove, Restore, Save, SeqId, StepPlan, StepResult, Transfer, Work
from pasture.scheduler.costs import Load, StepCosts

WARM_UP_TOKENS = 8
PROMPT_TOKENS = 64
SECONDS = 0.5
"""for the prompt, going by the warm-up, which is the prompt where a model is so slow that no longer one can be afforded"""

_TEXT = "Sixteen sheep graze on one common, and each of them finds what the others have left. "
_SEQUENCE = SeqId(0)
_EMPTY = Remove(_SEQUENCE, 0, None)


class Learner(Protocol):
    """Who decides about transfers: a store, or its gate."""

    def observe(self, transfers: Sequence[Transfer]) -> None: ...
    def observe_prefill(self, tokens_per_second: float) -> None: ...


def rehearse(engine: Engine, costs: StepCosts, learner: Learner, clock: Clock = perf_counter) -> None:
    """Measure, and tell `costs` and `learner`. Raises EngineError where the engine fails, whose cells nobody knows then."""
    shape = engine.shape
    most = min(shape.n_batch, shape.cells_per_sequence)
    n_tokens = min(WARM_UP_TOKENS, most)
    started = clock()
    result = _compute(engine, n_tokens)
    affordable = min(PROMPT_TOKENS, most, int(n_tokens * SECONDS / max(clock() - started, 1e-6)))
    if affordable > n_tokens:
        n_tokens = affordable
        engine.execute(StepPlan((_EMPTY,), ()))
        result = _compute(engine, n_tokens)
    if result.decode_seconds > 0:
        attended = 0 if shape.layout is Layout.STREAMS else n_tokens**2 // 2
        costs.observe(shape, Load(0, n_tokens, attended, n_tokens, n_tokens), 0, result.decode_seconds)
        learner.observe_prefill(costs.tokens_per_second)
    for is_second in (False, True):
        saved = engine.execute(StepPlan((Save(_SEQUENCE, 0, n_tokens, 0), _EMPTY), ()))
        restored = engine.execute(StepPlan((Restore(_SEQUENCE, (saved.saved[0],)),), ()))
        if is_second:
            learner.observe((*saved.transfers, *restored.transfers))
    engine.execute(StepPlan((_EMPTY,), ()))


def _compute(engine: Engine, n_tokens: int) -> StepResult:
    """A prompt's only step, in an empty sequence."""
    some = engine.vocabulary.tokenize(_TEXT, add_special=False, parse_special=False)
    tokens = (some * (n_tokens // len(some) + 1))[:n_tokens]
    result = engine.execute(StepPlan((), (Work(_SEQUENCE, tokens, 0, None),)))
    if result.outcome is not Outcome.DONE:
        raise EngineError(f"a step that measures ended with {result.outcome.value!r}")
    return result
