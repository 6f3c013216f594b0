"""How far each form of stored KV, and a live cache shifted down, moves a model's answers: measured on text it is given.

For each text a beginning is prefilled, and what follows is fed in pieces with the logits after every token: the reference.
Then the same is done behind the same beginning as each form brings it back, so that nothing differs but the form. Two
yardsticks go with it: RAW, which must move nothing, and the beginning computed again in other chunks, which is what llama.cpp
does anyway whenever the load differs. A model with quantised weights rounds its activations, so that for it any difference at
all, even one in the last bit, moves the answers by as much as that; with `Weights.F16` there is no such rounding.

    reference   [ prefilled ==================== ][ piece | piece | ...      logits after each token: p
    q8_0        [ packed, squeezed, restored === ][ piece | piece | ...      logits after each token: q       KL(p || q)

Needs an engine for itself; leaves it empty. Thread: the engine's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pasture.core.errors import DoesNotFit, EngineError
from pasture.core.storage import BLOCK_TOKENS, Bytes
from pasture.core.values import CellOperation, Form, Outcome, Remove, Restore, Save, Segment, SeqId, Slab, StepPlan, Work
from pasture.engine.llama import LlamaEngine

STORED_FORMS = (Form.RAW, Form.Q8_0, Form.Q4_0)
"""RAW stands for LOSSLESS too: the same bytes come back"""
RECOMPUTED = "other chunks"
LIVE = "live q8_0"
_SEQUENCE = SeqId(0)
_PIECE_TOKENS = 64
_CHUNK_TOKENS = 256
_OTHER_CHUNK_TOKENS = 50
"""short of a tile, as decoded tokens are"""

Rows = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class FormQuality:
    """One form against the cache as it was computed, over all tokens of all texts."""

    name: str
    """of a stored form, `RECOMPUTED` or `LIVE`"""
    n_tokens: int
    bytes_per_token: float
    kl_mean: float
    """nats"""
    kl_p99: float
    kl_max: float
    top1_agreement: float
    """share of tokens after which both find the same one most probable, 0 to 1"""
    perplexity: float
    reference_perplexity: float


@dataclass(slots=True)
class _Tally:
    bytes_per_token: float
    divergences: list[float] = field(default_factory=list)
    agreements: list[bool] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    reference_losses: list[float] = field(default_factory=list)

    def add(self, reference: Rows, found: Rows, following: Sequence[int]) -> None:
        """Log probabilities after some tokens, and the token that the text goes on with after each."""
        p, q = reference.astype(np.float64), found.astype(np.float64)
        rows = np.arange(len(following))
        self.divergences += (np.exp(p) * (p - q)).sum(axis=1).tolist()
        self.agreements += (p.argmax(axis=1) == q.argmax(axis=1)).tolist()
        self.losses += (-q[rows, following]).tolist()
        self.reference_losses += (-p[rows, following]).tolist()

    def result(self, name: str) -> FormQuality:
        divergences = np.array(self.divergences)
        return FormQuality(
            name=name,
            n_tokens=len(divergences),
            bytes_per_token=self.bytes_per_token,
            kl_mean=float(divergences.mean()),
            kl_p99=float(np.quantile(divergences, 0.99)),
            kl_max=float(divergences.max()),
            top1_agreement=float(np.mean(self.agreements)),
            perplexity=float(np.exp(np.mean(self.losses))),
            reference_perplexity=float(np.exp(np.mean(self.reference_losses))),
        )


def measure_quality(
    engine: LlamaEngine, texts: Sequence[Sequence[int]], *, context_tokens: int = 512, held_tokens: int = 256
) -> tuple[FormQuality, ...]:
    """`STORED_FORMS` in order, then `RECOMPUTED`, then `LIVE` where this model's cache can be shifted down.

    Each of `texts` is token ids, more than `context_tokens + held_tokens` of them; what is further is not used. Raises
    EngineError for a model whose sequences cannot be cut into blocks, an engine that is too small, or texts too short.
    """
    needed = context_tokens + held_tokens
    if not engine.model.shareable:
        raise EngineError("this model keeps running states, which are stored as they are: nothing to measure")
    if engine.shape.cells_per_sequence < needed:
        raise EngineError(f"quality needs a sequence of {needed} cells")
    if not texts or min(map(len, texts)) <= needed:
        raise EngineError(f"quality needs texts of more than {needed} tokens")
    tallies: dict[str, _Tally] = {}
    for text in texts:
        _Comparison(engine, text[: needed + 1], context_tokens, tallies).run()
    return tuple(tally.result(name) for name, tally in tallies.items())


class _Comparison:
    """One text: the reference, then every form against it."""

    def __init__(self, engine: LlamaEngine, text: Sequence[int], context_tokens: int, tallies: dict[str, _Tally]) -> None:
        self._engine = engine
        self._text = text
        self._context_tokens = context_tokens
        self._tallies = tallies
        self._reference: list[Rows] = []

    def run(self) -> None:
        for sequence in range(self._engine.shape.n_seqs):
            self._do(Remove(SeqId(sequence), 0, None))
        self._prefill(_CHUNK_TOKENS)
        slab = self._saved()
        payloads = self._packed(slab)
        self._reference = [rows for rows, _ in self._fed()]
        for form in STORED_FORMS:
            stored = [(self._engine.codec.squeeze(payload, form), p0, p1) for payload, p0, p1 in payloads]
            self._restore(tuple(self._engine.codec.unpack(*block) for block in stored))
            self._compare(form.value, sum(payload.nbytes for payload, *_ in stored))
        self._prefill(_OTHER_CHUNK_TOKENS)
        self._compare(RECOMPUTED, slab.n_bytes)
        self._restore((slab,))
        self._compare_live()
        self._do(Remove(_SEQUENCE, 0, None))

    def _compare_live(self) -> None:
        shape = self._engine.shape
        try:
            self._engine.rebuild([Segment((_SEQUENCE,), 0, self._context_tokens)], shape.layout, shape.n_seqs, Form.Q8_0)
        except DoesNotFit:
            return
        self._compare(LIVE, self._saved().n_bytes)
        self._engine.rebuild([], shape.layout, shape.n_seqs, Form.RAW)

    def _compare(self, name: str, n_bytes: int) -> None:
        tally = self._tallies.setdefault(name, _Tally(n_bytes / self._context_tokens))
        for reference, (rows, following) in zip(self._reference, self._fed(), strict=True):
            tally.add(reference, rows, following)

    def _fed(self) -> Iterator[tuple[Rows, Sequence[int]]]:
        """The rest of the text computed behind the context: log probabilities after each token, and what follows each."""
        size = min(_PIECE_TOKENS, self._engine.shape.n_seqs)
        end = len(self._text) - 1
        for start in range(self._context_tokens, end, size):
            stop = min(start + size, end)
            logits = self._engine.logits_after(_SEQUENCE, self._text[start:stop], start)
            peaks = logits.max(axis=1, keepdims=True)
            totals = np.log(np.exp(logits - peaks).sum(axis=1, keepdims=True, dtype=np.float64))
            yield (logits - peaks - totals).astype(np.float32), self._text[start + 1 : stop + 1]

    def _prefill(self, chunk_tokens: int) -> None:
        self._do(Remove(_SEQUENCE, 0, None))
        for start in range(0, self._context_tokens, chunk_tokens):
            work = Work(_SEQUENCE, self._text[start : min(start + chunk_tokens, self._context_tokens)], start, None)
            if self._engine.execute(StepPlan((), (work,))).outcome is not Outcome.DONE:
                raise EngineError("the context could not be computed")

    def _restore(self, slabs: tuple[Slab, ...]) -> None:
        self._do(Remove(_SEQUENCE, 0, None))
        self._do(Restore(_SEQUENCE, slabs))

    def _saved(self) -> Slab:
        return self._engine.execute(StepPlan((Save(_SEQUENCE, 0, self._context_tokens, 0),), ())).saved[0]

    def _packed(self, slab: Slab) -> list[tuple[Bytes, int, int]]:
        ends = [*range(BLOCK_TOKENS, self._context_tokens, BLOCK_TOKENS), self._context_tokens]
        ranges = [(end - 1) // BLOCK_TOKENS * BLOCK_TOKENS for end in ends]
        return [(self._engine.codec.pack(slab.cut(p0, p1)), p0, p1) for p0, p1 in zip(ranges, ends, strict=True)]

    def _do(self, operation: CellOperation) -> None:
        self._engine.execute(StepPlan((operation,), ()))
