"""`pasture bench shift`: how long everybody waits while a full live cache is written smaller, and how many people fit then.

    [ 1,000 tokens | 24 ] a user, as many as there are cells for
        shift down    every cell in q8_0, more cells in the same bytes    filled up with further users
        shift back    every cell as it was                                without them

A few conversations are computed for real, the other users have their KV again, in cells of their own. One request draws its
reply before, after the shift down and after the shift back: how far do the three agree? Works on the port of `pasture.core`
alone. Engine calls belong to the caller's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from random import Random
from time import perf_counter

from pasture.bench.corpus import passage
from pasture.core.errors import EngineError
from pasture.core.ports import Clock, Engine
from pasture.core.values import Form, Outcome, Remove, Restore, SamplingParams, Save, Segment, SeqId, Slab, StepPlan, Work

N_TOKENS, REPLY_TOKENS = 1000, 24
USER_CELLS = N_TOKENS + REPLY_TOKENS
"""that each user has room for"""
N_COMPUTED = 4
"""conversations that are computed for real"""
STEP_TOKENS = 256
_RUNNING = SeqId(0)


@dataclass(frozen=True, slots=True)
class Shifted:
    """One shift down and back."""

    down_seconds: float
    back_seconds: float
    agreeing_down: int
    """leading tokens of the running request's reply, after the shift down, that are those without a shift"""
    agreeing_back: int


@dataclass(frozen=True, slots=True)
class Found:
    cells_raw: int
    annex_cells: int
    """beside those, in bytes that are the pool's while it is shifted down"""
    cells_down: int
    users_raw: int
    """that fit at once"""
    users_down: int
    """the same: so many were there"""
    used_cells: int
    """that a shift rewrote, either way"""
    rounds: tuple[Shifted, ...]


def users_in(engine: Engine) -> int:
    """People whose conversations and replies fit into the live cache as it is."""
    return min(engine.shape.n_seqs, engine.shape.n_cells // USER_CELLS)


def measure(engine: Engine, seed: int, rounds: int, on_progress: Callable[[], None], clock: Clock = perf_counter) -> Found:
    """All of it; the engine is left empty. `on_progress` is called N_COMPUTED + `rounds` times.

    Raises DoesNotFit for a model whose live cache cannot be written smaller, EngineError for an engine that is too small.
    """
    if not engine.model.shareable:
        raise EngineError("this model keeps running states, which are not written smaller: nothing to measure")
    if users_in(engine) < 1:
        raise EngineError(f"a user takes {USER_CELLS} cells, and there are {engine.shape.n_cells}")
    rng = Random(f"shift-{seed}")
    texts = [_text(engine, rng) for _ in range(N_COMPUTED)]
    slabs = []
    for text in texts:
        slabs.append(_computed(engine, text))
        on_progress()
    cells_raw, annex_cells, users_raw = engine.shape.n_cells, engine.shape.annex_cells, users_in(engine)
    cells_down = users_down = 0
    found = []
    for _ in range(rounds):
        _admit(engine, slabs, range(users_raw))
        reference = _reply(engine, texts[0])
        down_seconds = _shift(engine, users_raw, Form.Q8_0, clock)
        cells_down, users_down = engine.shape.n_cells, users_in(engine)
        _admit(engine, slabs, range(users_raw, users_down))
        after_down = _reply(engine, texts[0])
        _leave(engine, range(users_raw, users_down))
        back_seconds = _shift(engine, users_raw, Form.RAW, clock)
        after_back = _reply(engine, texts[0])
        _leave(engine, range(users_raw))
        found.append(Shifted(down_seconds, back_seconds, _agreeing(reference, after_down), _agreeing(reference, after_back)))
        on_progress()
    return Found(cells_raw, annex_cells, cells_down, users_raw, users_down, users_raw * N_TOKENS, tuple(found))


def _text(engine: Engine, rng: Random) -> Sequence[int]:
    """One token more than is computed: the first of the running request's next step."""
    tokens = engine.vocabulary.tokenize(passage(rng, 2 * N_TOKENS), add_special=True, parse_special=False)
    return tokens[: N_TOKENS + 1]


def _computed(engine: Engine, text: Sequence[int]) -> Slab:
    """The KV of its first N_TOKENS tokens; the engine is left empty."""
    step = min(STEP_TOKENS, engine.shape.n_batch)
    for start in range(0, N_TOKENS, step):
        _step(engine, Work(_RUNNING, text[start : min(start + step, N_TOKENS)], start, None))
    result = engine.execute(StepPlan((Save(_RUNNING, 0, N_TOKENS, 0), Remove(_RUNNING, 0, None)), ()))
    return result.saved[0]


def _admit(engine: Engine, slabs: Sequence[Slab], users: range) -> None:
    restores = tuple(Restore(SeqId(user), (slabs[user % len(slabs)],)) for user in users)
    engine.execute(StepPlan(restores, ()))


def _leave(engine: Engine, users: range) -> None:
    engine.execute(StepPlan(tuple(Remove(SeqId(user), 0, None) for user in users), ()))


def _shift(engine: Engine, users: int, form: Form, clock: Clock) -> float:
    """Seconds."""
    segments = [Segment((SeqId(user),), 0, N_TOKENS) for user in range(users)]
    started = clock()
    engine.rebuild(segments, engine.shape.layout, engine.shape.n_seqs, form)
    return clock() - started


def _reply(engine: Engine, text: Sequence[int]) -> list[int]:
    """What the running request draws next; it is as long as before afterwards."""
    sampler = engine.sampler(SamplingParams(temperature=0.0), text)
    try:
        token, reply = text[-1], []
        for position in range(N_TOKENS, USER_CELLS):
            token = _step(engine, Work(_RUNNING, [token], position, sampler))[_RUNNING]
            reply.append(token)
    finally:
        sampler.close()
    engine.execute(StepPlan((Remove(_RUNNING, N_TOKENS, None),), ()))
    return reply


def _step(engine: Engine, work: Work) -> dict[SeqId, int]:
    result = engine.execute(StepPlan((), (work,)))
    if result.outcome is not Outcome.DONE:
        raise EngineError(f"a step of {len(work.tokens)} tokens ended with {result.outcome.value!r}")
    return {sequence: sample.token for sequence, sample in result.samples.items()}


def _agreeing(reference: Sequence[int], found: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(reference, found, strict=True)))
