"""`pasture bench idle`: what thousands of resting conversations cost those who are active, and what coming back costs.

    [ 600 shared | 400 own ]      a few conversations are computed for real
    [ 600 shared | 400 own ]      the others are their KV again, under tokens of their own: as large, as compressible and as
      ...                         costly to keep and restore; what they would answer is never looked at

Works on the ports of `pasture.core` alone: an engine and a store before the scheduler has them (`rest`), then services
(`decode_gaps`, `resume`). Two services run in one process, one with the resting conversations and one without, and take turns,
so that whatever else the machine does falls on both. Engine calls belong to the caller's thread.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from statistics import median
from uuid import uuid4

from pasture.bench.corpus import passage
from pasture.core.errors import EngineError
from pasture.core.ports import Engine, Service, Vocabulary
from pasture.core.storage import BLOCK_TOKENS, Bytes, Store
from pasture.core.values import (
    DEFAULT_NAMESPACE,
    Copy,
    Form,
    Outcome,
    Remove,
    Request,
    RequestId,
    Restore,
    SamplingParams,
    Save,
    SeqId,
    Slab,
    StepPlan,
    Usage,
    Work,
)

N_TOKENS, SHARED_TOKENS = 1000, 600
N_COMPUTED = 4
"""conversations that are computed for real"""
ACTIVE_USERS = 8
ACTIVE_PROMPT_TOKENS = 64
QUESTION_TOKENS = 8
RESTORES = 9
UNSQUEEZED_BYTES = 256 << 20
"""so much may wait to be squeezed before more is put"""
STEP_TOKENS = 256
_FIRST_ID = 300
_BASE = 1000

Deflate = Callable[[Bytes], Bytes]


@dataclass(frozen=True, slots=True)
class Resting:
    """A few computed conversations and their KV."""

    tokens: tuple[array[int], ...]
    slabs: tuple[Slab, ...]
    prefill_tokens_per_second: float

    def nth(self, index: int) -> tuple[array[int], Slab]:
        """The index-th conversation: one that was computed, or one's KV under other tokens."""
        number = index % len(self.tokens)
        tokens = self.tokens[number][:]
        if index >= len(self.tokens):
            tokens[SHARED_TOKENS] = _FIRST_ID + index // _BASE
            tokens[SHARED_TOKENS + 1] = _FIRST_ID + index % _BASE
        return tokens, self.slabs[number]


@dataclass(frozen=True, slots=True)
class FormCost:
    """One form, by the blocks of a computed conversation."""

    form: Form
    own_bytes: int
    """of what a conversation shares with nobody: whole blocks from the one in which it parts"""
    shared_bytes: int
    """of the blocks that all have in common"""
    full_bytes: int
    """of all its tokens in f16, as a saved state of its own would be"""
    restore_bytes_per_second: float
    """f16 bytes written into the live cache, from the form at rest, unpacking included"""

    def per_conversation(self, conversations: int) -> float:
        return self.own_bytes + self.shared_bytes / conversations

    def times_smaller(self, conversations: int) -> float:
        """Than a full f16 state each."""
        return self.full_bytes / self.per_conversation(conversations)


@dataclass(frozen=True, slots=True)
class Resumed:
    """One conversation's next turn."""

    ttft_seconds: float
    known_tokens: int
    """of the conversation so far, its last token included"""
    cached_tokens: int
    prompt_tokens: int

    @property
    def recomputed_tokens(self) -> int:
        """Old tokens that were computed again."""
        return max(0, self.known_tokens - self.cached_tokens)


# Before the scheduler


def compute(engine: Engine, seed: int) -> Resting:
    """Compute the real conversations; the engine is left empty."""
    rng = Random(f"idle-{seed}")
    shared = _text(engine.vocabulary, rng, SHARED_TOKENS)
    base, own = SeqId(0), SeqId(1)
    _prefill(engine, base, shared, 0)
    conversations, slabs, seconds = [], [], 0.0
    for _ in range(N_COMPUTED):
        tokens = shared + _text(engine.vocabulary, rng, N_TOKENS - SHARED_TOKENS)
        engine.execute(StepPlan((Copy(base, own, 0, SHARED_TOKENS),), ()))
        started = time.perf_counter()
        _prefill(engine, own, tokens[SHARED_TOKENS:], SHARED_TOKENS)
        seconds += time.perf_counter() - started
        result = engine.execute(StepPlan((Save(own, 0, N_TOKENS, 0), Remove(own, 0, None)), ()))
        conversations.append(array("i", tokens))
        slabs.append(result.saved[0])
    engine.execute(StepPlan((Remove(base, 0, None),), ()))
    return Resting(tuple(conversations), tuple(slabs), N_COMPUTED * (N_TOKENS - SHARED_TOKENS) / seconds)


def form_costs(engine: Engine, resting: Resting, deflate: Deflate) -> list[FormCost]:
    """Sizes and restore rates of every form; the engine is left empty."""
    slab = resting.slabs[0]
    ranges = [(p0, min(p0 + BLOCK_TOKENS, N_TOKENS)) for p0 in range(0, N_TOKENS, BLOCK_TOKENS)]
    payloads = [engine.codec.pack(slab.cut(p0, p1)) for p0, p1 in ranges]
    n_shared = SHARED_TOKENS // BLOCK_TOKENS
    costs = []
    for form in Form:
        stored = [_stored(engine, payload, form, deflate) for payload in payloads]
        costs.append(
            FormCost(
                form=form,
                own_bytes=sum(payload.nbytes for payload in stored[n_shared:]),
                shared_bytes=sum(payload.nbytes for payload in stored[:n_shared]),
                full_bytes=slab.n_bytes,
                restore_bytes_per_second=_restore_rate(engine, stored if form is not Form.LOSSLESS else payloads, ranges),
            )
        )
    return costs


def rest(
    store: Store, resting: Resting, conversations: int, squeezes: bool, on_progress: Callable[[int], None], limit_seconds: float
) -> None:
    """Put conversations to rest, no faster than the store squeezes them; returns when it has come to rest itself.

    Raises EngineError where a store in RAM alone does not keep them; on disk, `expected_blocks` tells how many there should be.
    """
    store.observe_prefill(resting.prefill_tokens_per_second)
    deadline = time.monotonic() + limit_seconds
    for index in range(conversations):
        tokens, slab = resting.nth(index)
        p0 = store.gap(DEFAULT_NAMESPACE, tokens, 0)
        if p0 < N_TOKENS:
            store.put(DEFAULT_NAMESPACE, tokens, slab.cut(p0, N_TOKENS))
        if not store.persistent and store.reach(DEFAULT_NAMESPACE, tokens) < N_TOKENS:
            raise EngineError(f"conversation {index + 1} was not kept: no room, or computing it again is cheaper")
        on_progress(index + 1)
        _wait(lambda: not squeezes or _raw_bytes(store) < UNSQUEEZED_BYTES, deadline)
        if store.persistent and index % 16 == 15:
            store.flush(max(1.0, deadline - time.monotonic()))
    store.flush(max(1.0, deadline - time.monotonic()))
    _wait(lambda: not squeezes or _raw_bytes(store) == 0, deadline)


def expected_blocks(conversations: int) -> int:
    """That a store holds when it holds all of them."""
    n_shared = SHARED_TOKENS // BLOCK_TOKENS
    return n_shared + conversations * (-(-N_TOKENS // BLOCK_TOKENS) - n_shared)


# With the scheduler


async def decode_gaps(service: Service, max_tokens: int, seed: int) -> float:
    """Median seconds between two tokens of each of the active users' replies, once all of them are decoding."""
    rng = Random(f"active-{seed}")
    prompts = [tuple(_text(service.vocabulary, rng, ACTIVE_PROMPT_TOKENS)) for _ in range(ACTIVE_USERS)]
    times = await asyncio.gather(*(_token_times(service, prompt, max_tokens) for prompt in prompts))
    began, ended = max(each[0] for each in times), min(each[-1] for each in times)
    gaps = [b - a for each in times for a, b in pairwise(each) if began <= a and b <= ended]
    if not gaps:
        raise EngineError("the active users never decoded together: ask for longer replies")
    return median(gaps)


async def resume(service: Service, tokens: Sequence[int], seed: int) -> Resumed:
    """The next turn of a conversation whose last token was drawn and not computed yet."""
    rng = Random(f"resume-{seed}")
    known = [*tokens, *_text(service.vocabulary, rng, 1)]
    prompt = tuple(known + _text(service.vocabulary, rng, QUESTION_TOKENS))
    started = time.perf_counter()
    first, usage = 0.0, Usage(0, 0, 0)
    async for event in service.generate(_request(prompt, 4)):
        if event.token is not None and not first:
            first = time.perf_counter()
        if event.finish is not None:
            usage = event.finish.usage
    return Resumed(first - started, len(known), usage.cached_tokens, usage.prompt_tokens)


# Inside


async def _token_times(service: Service, prompt: tuple[int, ...], max_tokens: int) -> list[float]:
    return [time.perf_counter() async for event in service.generate(_request(prompt, max_tokens)) if event.token is not None]


def _request(prompt: tuple[int, ...], max_tokens: int) -> Request:
    return Request(RequestId(uuid4().hex), prompt, max_tokens, SamplingParams(temperature=0.0), user=uuid4().hex)


def _text(vocabulary: Vocabulary, rng: Random, n_tokens: int) -> list[int]:
    tokens = vocabulary.tokenize(passage(rng, 2 * n_tokens + 16), add_special=False, parse_special=False)
    return tokens[:n_tokens]


def _prefill(engine: Engine, sequence: SeqId, tokens: Sequence[int], start: int) -> None:
    step = min(STEP_TOKENS, engine.shape.n_batch)
    for at in range(0, len(tokens), step):
        work = Work(sequence, tokens[at : at + step], start + at, None)
        if engine.execute(StepPlan((), (work,))).outcome is not Outcome.DONE:
            raise EngineError("a conversation could not be computed: more cells are needed")


def _stored(engine: Engine, payload: Bytes, form: Form, deflate: Deflate) -> Bytes:
    if form is Form.LOSSLESS:
        return deflate(payload)
    return engine.codec.squeeze(payload, form) if form is not Form.RAW else payload


def _restore_rate(engine: Engine, stored: Sequence[Bytes], ranges: Sequence[tuple[int, int]]) -> float:
    """Bytes a second as the live cache counts them, the median of a few restores of one conversation."""
    sequence, rates = SeqId(0), []
    for _ in range(RESTORES):
        started = time.perf_counter()
        slabs = tuple(engine.codec.unpack(payload, p0, p1) for payload, (p0, p1) in zip(stored, ranges, strict=True))
        engine.execute(StepPlan((Restore(sequence, slabs),), ()))
        rates.append(sum(slab.n_bytes for slab in slabs) / (time.perf_counter() - started))
        engine.execute(StepPlan((Remove(sequence, 0, None),), ()))
    return median(rates)


def _raw_bytes(store: Store) -> int:
    forms: Mapping[Form, int] = store.statistics().tiers[0].bytes_by_form
    return forms.get(Form.RAW, 0)


def _wait(done: Callable[[], bool], deadline: float) -> None:
    while not done():
        if time.monotonic() > deadline:
            raise EngineError("the store did not come to rest in time")
        time.sleep(0.01)
