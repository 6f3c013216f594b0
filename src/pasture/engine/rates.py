"""Prefill and decode rates of an engine, measured through its port in a few seconds.

Computes a prompt in one step after a short warm-up, then decodes a few tokens in one and in eight sequences, greedily. Each
measure is cut to a few seconds, so that a large model on a small machine keeps nobody waiting. The sequences are left empty.
Two ways of loading one model can be compared by it: which carries more people, and what it costs somebody who is alone.
Uses the clock that is passed in, and the thread that calls it, which must be the engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter

from pasture.core.errors import EngineError
from pasture.core.ports import Clock, Engine
from pasture.core.values import Outcome, Remove, SamplingParams, SeqId, StepPlan, Work

WARM_UP_TOKENS = 64
PREFILL_TOKENS = 512
DECODE_STEPS = 16
MEASURE_SECONDS = 2.0
"""about so long at most, a measure"""
DECODE_SEQUENCES = (1, 8)
CONTEXT_TOKENS = 64
"""each decoding sequence's prompt"""

PREFILL_RUNS = 3
"""the quickest counts: other work on the machine disturbs it least"""
PROMPT_TOKENS_A_REPLY_TOKEN = 2.0
"""that are computed, when conversations share what they have in common"""
WORTH = 0.9
"""of the time that another way takes: a smaller difference is not worth having"""
LONE_FACTOR = 1.6
"""somebody alone waits at most so many times as long for a token"""

N_MEASURES = 2 + len(DECODE_SEQUENCES)
"""calls of `on_progress`"""

_TEXT = "Sixteen sheep graze on one common, and each of them finds what the others have left. "


@dataclass(frozen=True, slots=True)
class DecodeRate:
    """Generation with so many sequences in every step."""

    sequences: int
    step_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.sequences / self.step_seconds


@dataclass(frozen=True, slots=True)
class Rates:
    """Of one way to load a model."""

    prefill_tokens_per_second: float
    decode: tuple[DecodeRate, ...]
    """one for each of `DECODE_SEQUENCES` that the engine has room for"""

    @classmethod
    def best(cls, found: Iterable[Rates]) -> Rates:
        """The best of each figure, of measurements of one thing."""
        rates = list(found)
        steps = zip(*(one.decode for one in rates), strict=True)
        return cls(
            max(one.prefill_tokens_per_second for one in rates),
            tuple(min(step, key=lambda rate: rate.step_seconds) for step in steps),
        )

    @property
    def shared_seconds(self) -> float:
        """A generated token of many, with the prompt tokens that go with it."""
        return PROMPT_TOKENS_A_REPLY_TOKEN / self.prefill_tokens_per_second + 1 / self.decode[-1].tokens_per_second

    def is_better_than(self, other: Rates) -> bool:
        """Whether this carries clearly more people, and nobody alone pays much for that."""
        lone, other_lone = self.decode[0].step_seconds, other.decode[0].step_seconds
        return self.shared_seconds < WORTH * other.shared_seconds and lone < LONE_FACTOR * other_lone

    def beside(self, other: Rates) -> str:
        """The comparison in words: seconds of this as shares of the other's."""
        steps = [
            f"a step of {here.sequences} {here.step_seconds / there.step_seconds:.2f}"
            for here, there in zip(self.decode, other.decode, strict=True)
        ]
        prompt = other.prefill_tokens_per_second / self.prefill_tokens_per_second
        return f"a prompt token takes {prompt:.2f} times as long as with the file's own, {', '.join(steps)} times"


def measure(engine: Engine, on_progress: Callable[[str], None] = lambda label: None, clock: Clock = perf_counter) -> Rates:
    """Measure; `on_progress` gets the name of what comes next. Raises EngineError when a step cannot be computed."""
    on_progress("Warming up")
    short = _prompt(engine, WARM_UP_TOKENS)
    _prefill(engine, short, clock)
    seconds_a_token = _prefill(engine, short, clock) / len(short)
    on_progress("Measuring prefill")
    most = min(PREFILL_TOKENS, engine.shape.n_batch, engine.shape.cells_per_sequence // 2)
    tokens = _prompt(engine, max(WARM_UP_TOKENS, min(most, int(MEASURE_SECONDS / max(seconds_a_token, 1e-6)))))
    prefill_seconds = [_prefill(engine, tokens, clock)]
    while len(prefill_seconds) < PREFILL_RUNS and sum(prefill_seconds) < MEASURE_SECONDS:
        prefill_seconds.append(_prefill(engine, tokens, clock))
    rates = []
    for n_sequences in DECODE_SEQUENCES:
        if n_sequences <= engine.shape.n_seqs and n_sequences * 2 * CONTEXT_TOKENS <= engine.shape.n_cells:
            on_progress(f"Measuring decode, {n_sequences} at once")
            rates.append(DecodeRate(n_sequences, _decode(engine, tokens[:CONTEXT_TOKENS], n_sequences, clock)))
    return Rates(len(tokens) / min(prefill_seconds), tuple(rates))


def _prompt(engine: Engine, n_tokens: int) -> Sequence[int]:
    some = engine.vocabulary.tokenize(_TEXT, add_special=False, parse_special=False)
    return (some * (n_tokens // len(some) + 1))[:n_tokens]


def _prefill(engine: Engine, tokens: Sequence[int], clock: Clock) -> float:
    sequence = SeqId(0)
    start = clock()
    _step(engine, [Work(sequence, tokens, 0, None)])
    seconds = clock() - start
    engine.execute(StepPlan((Remove(sequence, 0, None),), ()))
    return seconds


def _decode(engine: Engine, prompt: Sequence[int], n_sequences: int, clock: Clock) -> float:
    """Seconds a step, the median."""
    sequences = [SeqId(number) for number in range(n_sequences)]
    samplers = [engine.sampler(SamplingParams(temperature=0.0), prompt) for _ in sequences]
    try:
        for sequence in sequences:
            _step(engine, [Work(sequence, prompt, 0, None)])
        seconds: list[float] = []
        last = [prompt[-1]] * n_sequences
        begin = clock()
        for step in range(DECODE_STEPS):
            if seconds and clock() - begin > MEASURE_SECONDS:
                break
            works = [
                Work(sequence, [token], len(prompt) + step, sampler)
                for sequence, token, sampler in zip(sequences, last, samplers, strict=True)
            ]
            start = clock()
            samples = _step(engine, works)
            seconds.append(clock() - start)
            last = [samples[sequence] for sequence in sequences]
        return sorted(seconds)[len(seconds) // 2]
    finally:
        engine.execute(StepPlan(tuple(Remove(sequence, 0, None) for sequence in sequences), ()))
        for sampler in samplers:
            sampler.close()


def _step(engine: Engine, works: Sequence[Work]) -> dict[SeqId, int]:
    result = engine.execute(StepPlan((), tuple(works)))
    if result.outcome is not Outcome.DONE:
        raise EngineError(f"a step of {sum(len(work.tokens) for work in works)} tokens ended with {result.outcome.value!r}")
    return {sequence: sample.token for sequence, sample in result.samples.items()}
