"""An engine without a model, for tests and for measuring what everything around the model costs.

Its next token is a function of the exact tokens in the cells that a sequence attends to: every cell carries a hash of its
token, its position and of all the cells it attended to when it was computed, as a real key and value do. So a wrong share, a
stale restore or a forgotten removal changes the text. `expected_reply` says what a lone, cold run would answer.

It honours the real engine's limits: cells, sequence ids, batch size, one stream a sequence, the copy rules of the layout, and
partial failure on demand (`fail_next`). Where llama.cpp would abort the process, it raises EngineError. Shifted down, it has
more cells with the same content: what its codec calls Q8_0 is smaller and loses nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pasture.core.errors import DoesNotFit, EngineError, RequestError
from pasture.core.ports import Vocabulary
from pasture.core.values import (
    CellOperation,
    Compact,
    Constraint,
    Copy,
    Direction,
    Form,
    Layout,
    ModelInfo,
    Outcome,
    PoolShape,
    Release,
    Remove,
    Restore,
    Sample,
    Sampler,
    SamplingParams,
    Save,
    Segment,
    SeqId,
    Share,
    Slab,
    StepPlan,
    StepResult,
    TokenLogprobs,
    Transfer,
    Work,
)
from pasture.engine.fakecodec import CELL_BYTES, Cell, FakeCodec, FakeSlab
from pasture.engine.grammars import Grammars, Guide

__all__ = ["BOS_TOKEN", "END_TOKEN", "N_VOCAB", "Cell", "FakeEngine", "FakeSlab", "expected_reply"]

_MASK = (1 << 64) - 1
N_VOCAB = 512
"""0..255 are bytes, 256 ends a reply, 257 begins a text, the rest are two-byte words"""
END_TOKEN = 256
BOS_TOKEN = 257


def _mix(*parts: int) -> int:
    """A 64-bit hash of integers (the finaliser of splitmix64, chained)."""
    h = 0x9E3779B97F4A7C15
    for part in parts:
        h = (h ^ part) * 0xBF58476D1CE4E5B9 & _MASK
        h ^= h >> 27
        h = h * 0x94D049BB133111EB & _MASK
        h ^= h >> 31
    return h


class FakeSampler(Sampler):
    """Greedy at temperature 0; else a choice that depends on the seed and on how often it was asked, as a generator's would."""

    def __init__(self, params: SamplingParams, n_drawn: int = 0, guide: Guide | None = None) -> None:
        self.params = params
        self.n_drawn = n_drawn
        self.guide = guide

    def draw(self, mark: int, n_vocab: int) -> int:
        """Raises RequestError where the constraint leaves nothing to draw."""
        salt = 0 if self.params.temperature == 0 else (self.params.seed or 0) * 1_000_003 + self.n_drawn + 1
        self.n_drawn += 1
        if self.guide is not None:
            return self._guided(self.guide, _mix(mark, salt, 0))
        for attempt in range(64):
            token = _mix(mark, salt, attempt) % n_vocab
            if token != BOS_TOKEN and self.params.logit_bias.get(token, 0.0) > -100:
                return token
        return next(t for t in range(n_vocab) if self.params.logit_bias.get(t, 0.0) > -100)

    def _guided(self, guide: Guide, chance: int) -> int:
        tokens = [int(t) for t in np.flatnonzero(guide.allowed()) if self.params.logit_bias.get(int(t), 0.0) > -100]
        if not tokens:
            raise guide.refusal("logit_bias bans every token that it allows")
        token = tokens[chance % len(tokens)]
        guide.accept(token)
        return token


class FakeVocabulary:
    """Bytes are tokens; words of two letters are tokens too, so that text can be split in more than one way."""

    chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    n_tokens = N_VOCAB
    end_tokens = frozenset({END_TOKEN})
    bos = BOS_TOKEN
    eos = END_TOKEN
    add_bos = False

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return list(text.encode())

    def piece(self, token: int, *, special: bool = False) -> bytes:
        if token < 256:
            return bytes([97 + token % 26]) if token >= 128 else bytes([token])
        if token in (END_TOKEN, BOS_TOKEN):
            return b"<end>" if special and token == END_TOKEN else b"<bos>" if special else b""
        return bytes([97 + token % 26, 32])


class FakeEngine:
    """See the module. `recurrent=True` refuses to cut or join parts, as a recurrent model does."""

    def __init__(self, shape: PoolShape, *, recurrent: bool = False) -> None:
        self._shape = shape
        self._recurrent = recurrent
        self._cells: dict[SeqId, list[Cell]] = {}
        self._sums: dict[SeqId, int] = {}
        self._refs: dict[int, int] = {}
        self._left: list[Cell] = []
        """taken, though nobody attends to them"""
        self._decodes_to_fail: list[Outcome] = []
        self.interrupted = threading.Event()
        self._raw_cells, self._annex_cells = shape.n_cells, shape.annex_cells
        self.codec = FakeCodec()
        self.transfer_seconds = 0.0
        """what it claims that saving or restoring a token takes"""
        self.closed = False
        self.n_computed = 0
        """tokens put through the model since the start"""
        self.vocabulary: Vocabulary = FakeVocabulary()
        self._grammars = Grammars(self.vocabulary)

    @property
    def model(self) -> ModelInfo:
        return ModelInfo("fake", "", "fake", "no model", 0, 0, N_VOCAB, 1, 1 << 20, CELL_BYTES[Form.RAW], not self._recurrent)

    @property
    def shape(self) -> PoolShape:
        return self._shape

    @property
    def used_cells(self) -> int:
        """Cells that somebody attends to."""
        return len(self._refs)

    @property
    def left_cells(self) -> int:
        """Cells that compactions left."""
        return len(self._left)

    def tokens_of(self, sequence: SeqId) -> list[int]:
        """What the sequence attends to, for comparing with the pool's books."""
        return [cell.token for cell in self._cells.get(sequence, [])]

    def fail_next(self, *outcomes: Outcome) -> None:
        """The next decodes end with these outcomes instead of DONE."""
        self._decodes_to_fail.extend(outcomes)

    def interrupt(self, wanted: bool) -> None:
        if wanted:
            self.interrupted.set()
        else:
            self.interrupted.clear()

    def sampler(self, params: SamplingParams, prompt: Sequence[int], n_drawn: int = 0) -> FakeSampler:
        constraint = params.constraint
        guide = None if constraint is None else self._grammars.guide(constraint, prompt[len(prompt) - n_drawn :])
        return FakeSampler(params, n_drawn, guide)

    def prepare(self, constraint: Constraint) -> object:
        return self._grammars.prepare(constraint)

    def execute(self, plan: StepPlan) -> StepResult:
        time.sleep(0)  # lets other threads run, as the real engine does while it computes
        saved: dict[int, Slab] = {}
        transfers = tuple(filter(None, [self._operate(operation, saved) for operation in plan.operations]))
        if any(w.in_annex and w.start + len(w.tokens) > self._shape.annex_cells for w in plan.works):
            raise EngineError(f"a work that does not fit into an annex of {self._shape.annex_cells} cells")
        if plan.n_tokens > self._shape.n_batch:
            raise EngineError(f"{plan.n_tokens} tokens in a batch of {self._shape.n_batch}")
        lost: set[SeqId] = set()
        outcome = self._decodes_to_fail.pop(0) if plan.works and self._decodes_to_fail else Outcome.DONE
        if plan.works and self.interrupted.is_set():
            outcome = Outcome.INTERRUPTED
        if outcome is Outcome.DONE and plan.works and not self._fits(plan):
            outcome = Outcome.NO_ROOM
        if outcome in (Outcome.FAILED, Outcome.INTERRUPTED):
            for work in plan.works[: len(plan.works) // 2 + 1]:  # a part was computed, then cut back
                if self._recurrent and work.start:
                    self._remove(Remove(work.sequence, 0, None))
                    lost.add(work.sequence)
        if outcome is not Outcome.DONE:
            return StepResult(outcome, {}, saved, 0.0, lost=frozenset(lost), transfers=transfers)
        samples, refused = {}, {}
        for work in plan.works:
            try:
                sample = self._compute(work)
                if sample is not None:
                    samples[work.sequence] = sample
            except RequestError as error:
                refused[work.sequence] = error
        return StepResult(Outcome.DONE, samples, saved, 0.0, transfers=transfers, refused=refused)

    def rebuild(self, segments: Sequence[Segment], layout: Layout, n_seqs: int, form: Form | None = None) -> PoolShape:
        form = self._shape.form if form is None else form
        if form is not Form.RAW and (form is not Form.Q8_0 or self._recurrent):
            raise DoesNotFit(f"no live cache in {form}")
        n_cells = self._raw_cells if form is Form.RAW else self._raw_cells + self._annex_cells
        n_cells = n_cells * CELL_BYTES[Form.RAW] // CELL_BYTES[form]
        gains = layout is Layout.UNIFIED and form is Form.RAW
        annex_cells = self._annex_cells if gains else 0
        shape = replace(self._shape, n_seqs=n_seqs, layout=layout, form=form, n_cells=n_cells, annex_cells=annex_cells)
        kept: dict[SeqId, list[Cell]] = {}
        for segment in segments:
            cells = self._cells[segment.holders[0]][segment.p0 : segment.p1]
            if len(cells) != segment.p1 - segment.p0:
                raise EngineError(f"segment [{segment.p0}, {segment.p1}) of sequence {segment.holders[0]} is not there")
            for holder in segment.holders:
                mine = kept.setdefault(holder, [])
                if len(mine) != segment.p0 or holder >= n_seqs:
                    raise EngineError(f"segment at {segment.p0} does not continue sequence {holder}")
                mine.extend(cells if layout is Layout.UNIFIED else [Cell(c.token, c.pos, c.mark) for c in cells])
        if any(len(cells) > shape.cells_per_sequence for cells in kept.values()):
            raise DoesNotFit(f"a sequence is longer than {shape.cells_per_sequence} cells")
        n_used = len({id(cell) for cells in kept.values() for cell in cells})
        if n_used > n_cells:
            raise DoesNotFit(f"{n_used} cells in use do not fit into {n_cells}")
        self._shape = shape
        self._cells, self._refs, self._sums = kept, {}, {}
        self._left.clear()
        for sequence, cells in kept.items():
            self._sums[sequence] = sum(cell.mark for cell in cells) & _MASK
            self._hold(cells)
        return shape

    def close(self) -> None:
        self.closed = True

    # Inside

    def _operate(self, operation: CellOperation, saved: dict[int, Slab]) -> Transfer | None:
        match operation:
            case Copy():
                self._copy(operation)
            case Remove():
                self._remove(operation)
            case Share():
                self._share(operation)
            case Compact():
                self._compact(operation)
            case Release():
                self._left.clear()
            case Save(sequence, p0, p1, key):
                cells = self._cells.get(sequence, [])
                if not 0 <= p0 <= p1 <= len(cells) or (self._recurrent and (p0, p1) != (0, len(cells))):
                    raise EngineError(f"cannot save [{p0}, {p1}) of sequence {sequence}")
                saved[key] = slab = FakeSlab(p0, tuple(cells[p0:p1]))
                return self._transfer(Direction.SAVE, [slab])
            case Restore(sequence, slabs):
                for part in slabs:
                    self._restore(sequence, part)
                return self._transfer(Direction.RESTORE, slabs)
        return None

    def _transfer(self, direction: Direction, slabs: Sequence[Slab]) -> Transfer:
        n_tokens = sum(slab.p1 - slab.p0 for slab in slabs)
        return Transfer(direction, n_tokens, sum(slab.n_bytes for slab in slabs), n_tokens * self.transfer_seconds)

    def _copy(self, copy: Copy) -> None:
        source = self._cells.get(copy.source, [])
        target = self._cells.setdefault(copy.target, [])
        if copy.target >= self._shape.n_seqs or len(target) != copy.p0 or not copy.p0 < copy.p1 <= len(source):
            raise EngineError(f"cannot copy {copy}")
        if self._recurrent and (copy.p0, copy.p1) != (0, len(source)):
            raise EngineError("a recurrent state cannot be joined in the middle")
        cells = source[copy.p0 : copy.p1]
        if self._shape.layout is Layout.STREAMS or self._recurrent:
            if copy.p0 != 0:
                raise EngineError("streams copy from position 0 only")
            cells = [Cell(c.token, c.pos, c.mark) for c in cells]
        self._put(copy.target, cells)

    def _share(self, share: Share) -> None:
        source, target = self._cells.get(share.source, []), self._cells.get(share.target, [])
        mine, theirs = target[share.p0 : share.p1], source[share.p0 : share.p1]
        if self._shape.layout is Layout.STREAMS or self._recurrent or not 0 <= share.p0 < share.p1 <= len(target):
            raise EngineError(f"cannot share {share}")
        if mine != theirs:
            raise EngineError(f"{share}: the sequences differ there")
        self._hold(theirs)
        target[share.p0 : share.p1] = theirs
        self._drop(mine)

    def _compact(self, compact: Compact) -> None:
        cells = self._cells.get(compact.sequence, [])[compact.p0 : compact.p1]
        if (
            self._shape.layout is Layout.STREAMS
            or self._recurrent
            or not 0 <= compact.p0 < compact.p1 == compact.p0 + len(cells)
        ):
            raise EngineError(f"cannot compact {compact}")
        if any(self._refs[id(cell)] > 1 for cell in cells):
            raise EngineError(f"{compact}: others hold some of these cells")
        if len(self._refs) + len(self._left) + len(cells) <= self._shape.n_cells:
            self._left += [Cell(cell.token, cell.pos, cell.mark) for cell in cells]

    def _remove(self, remove: Remove) -> None:
        cells = self._cells.get(remove.sequence, [])
        p1 = len(cells) if remove.p1 is None else remove.p1
        if not 0 <= remove.p0 < p1 <= len(cells):
            raise EngineError(f"cannot remove {remove}: the sequence has {len(cells)} cells")
        if p1 != len(cells):
            raise EngineError("only the end of a sequence can be removed")
        if self._recurrent and remove.p0 != 0:
            raise EngineError("a recurrent state cannot be cut")
        self._drop(cells[remove.p0 :])
        self._sums[remove.sequence] -= sum(cell.mark for cell in cells[remove.p0 :])
        del cells[remove.p0 :]
        if not cells:
            del self._cells[remove.sequence], self._sums[remove.sequence]

    def _restore(self, sequence: SeqId, slab: Slab) -> None:
        assert isinstance(slab, FakeSlab)
        if len(self._cells.setdefault(sequence, [])) != slab.p0 or sequence >= self._shape.n_seqs:
            raise EngineError(f"cannot restore at {slab.p0} of sequence {sequence}")
        cells = [Cell(c.token, c.pos, c.mark) for c in slab.cells]
        if slab.p0 + len(cells) > self._shape.cells_per_sequence:
            raise EngineError(f"a slab that ends at {slab.p1}; a sequence holds {self._shape.cells_per_sequence}")
        if len(self._refs) + len(self._left) + len(cells) > self._shape.n_cells:
            raise EngineError("no room to restore into")
        self._put(sequence, cells)

    def _put(self, sequence: SeqId, cells: list[Cell]) -> None:
        self._cells[sequence].extend(cells)
        self._sums[sequence] = self._sums.get(sequence, 0) + sum(cell.mark for cell in cells)
        self._hold(cells)

    def _hold(self, cells: Sequence[Cell]) -> None:
        for cell in cells:
            self._refs[id(cell)] = self._refs.get(id(cell), 0) + 1

    def _drop(self, cells: Sequence[Cell]) -> None:
        for cell in cells:
            self._refs[id(cell)] -= 1
            if not self._refs[id(cell)]:
                del self._refs[id(cell)]

    def _fits(self, plan: StepPlan) -> bool:
        if self._shape.layout is Layout.STREAMS:
            limit = self._shape.cells_per_sequence
            return all(work.start + len(work.tokens) + work.pad_tokens <= limit for work in plan.works)
        return len(self._refs) + len(self._left) + plan.n_cells <= self._shape.n_cells

    def _compute(self, work: Work) -> Sample | None:
        cells = self._cells.setdefault(work.sequence, [])
        if work.sequence >= self._shape.n_seqs or len(cells) != work.start or not work.tokens:
            raise EngineError(f"sequence {work.sequence} has {len(cells)} cells, work starts at {work.start}")
        total = self._sums.get(work.sequence, 0)
        for token in work.tokens:
            cell = Cell(token, len(cells), _mix(token, len(cells), total & _MASK))
            cells.append(cell)
            self._refs[id(cell)] = 1
            total += cell.mark
        self._sums[work.sequence] = total
        self.n_computed += len(work.tokens)
        if work.sampler is None:
            return None
        assert isinstance(work.sampler, FakeSampler)
        token = work.sampler.draw(total & _MASK, N_VOCAB)
        logprobs = None
        if work.n_logprobs is not None:
            top = tuple(((token + i) % N_VOCAB, -0.5 - i) for i in range(work.n_logprobs))
            logprobs = TokenLogprobs(-0.5, top)
        guide = work.sampler.guide
        return Sample(token, logprobs, is_last=guide is not None and guide.ended)


def expected_reply(
    prompt: Sequence[int], max_tokens: int, params: SamplingParams, stop_tokens: frozenset[int] = frozenset()
) -> list[int]:
    """What a lone, cold run of the fake engine answers: the reference for every test of sharing."""
    engine = FakeEngine(PoolShape(len(prompt) + max_tokens + 1, 1, n_batch=len(prompt)))
    sampler = engine.sampler(params, prompt)
    reply: list[int] = []
    tokens, start = list(prompt), 0
    while len(reply) < max_tokens:
        result = engine.execute(StepPlan((), (Work(SeqId(0), tokens, start, sampler),)))
        start += len(tokens)
        token = result.samples[SeqId(0)].token
        if token in stop_tokens:
            break
        reply.append(token)
        tokens = [token]
    return reply
