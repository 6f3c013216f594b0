"""The engine on llama.cpp: a step plan in, a step result out.

Owns a loaded `Model` and one `Context` on it, which `rebuild` replaces. `execute` is three moves: carry out the operations,
decode every work in one batch, draw a token for each work that wants one. Return codes of llama_decode, as its header
documents them, become outcomes here:

    0            DONE
    1            NO_ROOM   nothing was computed
    -1           EngineError: the planner built an impossible batch
    2, < -1      FAILED    some of it may be in the cache, so every work's sequence is cut back to its start

A plan larger than a batch is decoded in several; until the last of them succeeded nothing is drawn, so a failure in the
middle leaves samplers and sequences as they were. Thread: one; `vocabulary` alone may be read from any.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pasture.core.errors import DoesNotFit, EngineError, ModelError, RequestError
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
    Transfer,
    Work,
)
from pasture.engine.annex import Annex, Computed
from pasture.engine.assembly import Workbench
from pasture.engine.bindings import ABORTED, DECODED, NO_SLOT, Brake
from pasture.engine.blob import CacheKind, KvFormat, StateSlab
from pasture.engine.blockcodec import LlamaCodec, kinds_in
from pasture.engine.context import Context, Piece, on_host
from pasture.engine.fingerprint import kv_fingerprint
from pasture.engine.grammars import Grammars
from pasture.engine.memory import MIB, available_bytes
from pasture.engine.model import Model
from pasture.engine.relayout import Room, Sketch, check_fit, fill, gather, settings_in
from pasture.engine.sampling import LlamaSampler, Logits, log_probabilities
from pasture.engine.settings import EngineSettings
from pasture.engine.stateblob import StateFormat
from pasture.engine.transfer import PartTransfer, StateTransfer
from pasture.engine.vocabulary import LlamaVocabulary

log = logging.getLogger(__name__)

_INVALID_BATCH = -1
ANNEX_UBATCH = 256
"""tokens: as quick as 512, with half of the buffers to compute in"""


class LlamaEngine:
    """Implements `pasture.core.ports.Engine`. Made by `open_engine`, which also hands over the model."""

    def __init__(
        self,
        model: Model,
        context: Context,
        settings: EngineSettings,
        kv_format: KvFormat | None,
        state_format: StateFormat | None = None,
    ) -> None:
        """`kv_format` where sequences can be cut; else `state_format`, or neither for a model nothing of which is stored."""
        self._model = model
        self._settings = settings
        self._kv_format = kv_format
        self._state_format = state_format
        self._brake = Brake()
        self._bench = Workbench()
        self._annex = self._furnished() if settings.annex_cells and kv_format is not None and context.shape.can_pad else None
        self._annex_cells = 0 if self._annex is None else self._annex.n_cells
        """also while it is away"""
        self._use(context)
        self._on_host = on_host(settings)
        self._closed = False
        self._codec = self._make_codec()
        self._grammars = Grammars(model.vocabulary)

    @property
    def model(self) -> ModelInfo:
        return self._model.info

    @property
    def vocabulary(self) -> LlamaVocabulary:
        return self._model.vocabulary

    @property
    def shape(self) -> PoolShape:
        return self._shape

    @property
    def codec(self) -> LlamaCodec:
        return self._codec

    def sampler(self, params: SamplingParams, prompt: Sequence[int], n_drawn: int = 0) -> Sampler:
        """A fresh sampler whose penalty windows hold the end of `prompt`. Raises RequestError on impossible parameters."""
        constraint = params.constraint
        guide = None if constraint is None else self._grammars.guide(constraint, prompt[len(prompt) - n_drawn :])
        return LlamaSampler(params, prompt, self.vocabulary, self.shape.n_cells, n_drawn, guide)

    def prepare(self, constraint: Constraint) -> object:
        """See `pasture.core.ports.Engine.prepare`."""
        return self._grammars.prepare(constraint)

    def execute(self, plan: StepPlan) -> StepResult:
        """Operations in order, then every work. Raises EngineError when the plan is impossible."""
        self._check_open()
        saved: dict[int, Slab] = {}
        transfers = tuple(filter(None, [self._carry_out(operation, saved) for operation in plan.operations]))
        result = self._compute(plan, saved) if plan.works else StepResult(Outcome.DONE, {}, saved, 0.0)
        return replace(result, transfers=transfers) if transfers else result

    def interrupt(self, wanted: bool) -> None:
        """See `pasture.core.ports.Engine.interrupt`."""
        self._brake.set(wanted)

    def logits_after(self, sequence: SeqId, tokens: Sequence[int], start: int) -> Logits:
        """Compute tokens of one sequence; the raw logits after each of them, `(n_tokens, n_vocab) float32`, a copy.

        At most `shape.n_seqs` tokens, for more rows than that the library keeps no room. Raises EngineError where they cannot
        be computed.
        """
        self._check_open()
        self._check_ids(sequence)
        if not 0 < len(tokens) <= self.shape.n_seqs:
            raise EngineError(f"logits after {len(tokens)} tokens at once; there is room for {self.shape.n_seqs}")
        pieces = [Piece(sequence, [token], start + index, wants_logits=True) for index, token in enumerate(tokens)]
        code, _ = self._context.decode(pieces)
        if code != DECODED:
            raise EngineError(f"llama_decode answered {code}")
        return self._context.logits(len(pieces)).copy()

    def _compute(self, plan: StepPlan, saved: dict[int, Slab]) -> StepResult:
        self._check_works(plan.works)
        decode_seconds = apart_seconds = 0.0
        rows: list[NDArray[np.float32]] = []
        in_annex = [work for work in plan.works if work.in_annex]
        works = [work for work in plan.works if not work.in_annex]
        apart = list(_batches(works[: plan.n_apart], self.shape.n_batch))
        batches = [*apart, *_batches(works[plan.n_apart :], self.shape.n_batch)]
        n_parts = len(batches) + len(in_annex)
        for i, batch in enumerate(batches):
            code, seconds = self._context.decode(batch, plan.pad_to if i >= len(apart) else 0)
            decode_seconds += seconds
            apart_seconds += seconds if i < len(apart) else 0.0
            if code != DECODED:
                return self._failure(code, plan.works, saved, decode_seconds)
            view = self._context.logits(sum(piece.wants_logits for piece in batch))
            rows.append(view if n_parts == 1 else view.copy())
        annex_seconds = moving_seconds = 0.0
        for work in in_annex:
            computed = self._compute_in_annex(work)
            decode_seconds += computed.decode_seconds
            annex_seconds += computed.decode_seconds
            moving_seconds += computed.moving_seconds
            if computed.code != DECODED:
                return self._failure(computed.code, plan.works, saved, decode_seconds)
            rows.append(computed.logits if n_parts == 1 else computed.logits.copy())
        began = time.perf_counter()
        refused: dict[SeqId, RequestError] = {}
        samples = self._draw([*works, *in_annex], rows[0] if n_parts == 1 else np.concatenate(rows), refused)
        return StepResult(
            Outcome.DONE,
            samples,
            saved,
            decode_seconds,
            apart_seconds,
            annex_seconds,
            moving_seconds,
            sample_seconds=time.perf_counter() - began,
            refused=refused,
        )

    def _compute_in_annex(self, work: Work) -> Computed:
        if self._annex is None or not self.shape.annex_cells or not isinstance(self._transfer, PartTransfer):
            raise EngineError("a work for the annex, and this cache has none")
        return self._annex.compute(work, self._transfer)

    def rebuild(self, segments: Sequence[Segment], layout: Layout, n_seqs: int, form: Form | None = None) -> PoolShape:
        """See `pasture.core.ports.Engine.rebuild`; the model stays loaded, samplers live on.

        Raises EngineError where the old cache had to go first and neither it nor the new one could be made: from then on the
        engine is lost, and every call says so.
        """
        self._check_open()
        old = self.shape
        form = old.form if form is None else form
        settings = self._settings_in(form)
        check_fit(self._model, settings, segments, old, layout, n_seqs)
        if form is not Form.RAW:
            self._give_annex_up()
        try:
            self._lay_out(segments, settings, layout, n_seqs, form)
        finally:
            self._take_annex_up()
        return self.shape

    def _lay_out(self, segments: Sequence[Segment], settings: EngineSettings, layout: Layout, n_seqs: int, form: Form) -> None:
        old = self.shape
        old_sketch = Sketch(self._settings_in(old.form), self._live_kinds(), old.layout, old.n_seqs)
        new_sketch = Sketch(settings, self._kinds_in(form), layout, n_seqs)
        room = Room.of(segments, self._model, old_sketch, new_sketch)
        if (layout, n_seqs, form) == (old.layout, old.n_seqs, old.form):
            self._check_room(room.in_place_bytes)
            slabs = list(gather(self._transfer, segments))
            self._context.clear()
            fill(self._transfer, segments, slabs, layout)
        elif room.beside_bytes > self._free_bytes() or not self._move_beside(segments, settings, layout, n_seqs, form):
            self._check_room(room.through_memory_bytes)
            self._move_through_memory(segments, settings, layout, n_seqs, form)

    def _move_beside(
        self, segments: Sequence[Segment], settings: EngineSettings, layout: Layout, n_seqs: int, form: Form
    ) -> bool:
        """Make the new cache while the old one stands, and carry segment by segment over. False: there is no room for both."""
        before = self._context
        source = self._transfer
        try:
            self._use(Context(self._model, settings, layout, n_seqs, form))
        except ModelError:
            return False
        try:
            fill(self._transfer, segments, gather(source, segments), layout)
        except BaseException:
            self._context.close()
            self._use(before)
            raise
        before.close()
        return True

    def _move_through_memory(
        self, segments: Sequence[Segment], settings: EngineSettings, layout: Layout, n_seqs: int, form: Form
    ) -> None:
        """Everything out, the old cache freed, the new one made, everything in; all back where that cannot be made."""
        old = self.shape
        slabs = list(gather(self._transfer, segments))
        self._context.close()
        try:
            self._use(Context(self._model, settings, layout, n_seqs, form))
        except Exception as error:
            self._make_again(old)
            fill(self._transfer, segments, slabs, old.layout)
            raise DoesNotFit(str(error)) from error
        fill(self._transfer, segments, slabs, layout)

    def _make_again(self, old: PoolShape) -> None:
        """An empty cache of the shape that was given up. Raises EngineError, with the engine lost, where there is no room."""
        try:
            self._use(Context(self._model, self._settings_in(old.form), old.layout, old.n_seqs, old.form))
        except Exception as error:
            raise EngineError(f"the live cache is lost: it was freed for another, and cannot be made again: {error}") from error

    def _free_bytes(self) -> float:
        """That a rebuild may take; of a device's memory its allocator knows, and refuses what is too much."""
        return available_bytes() if self._on_host else math.inf

    def _check_room(self, n_bytes: int) -> None:
        if n_bytes > self._free_bytes():
            raise DoesNotFit(f"laying the cache out anew takes {n_bytes / MIB:.0f} MiB for a while, and fewer are free")

    def _settings_in(self, form: Form) -> EngineSettings:
        """Of the live cache; shifted down, it has the annex's bytes too."""
        n_cells = self._settings.n_cells + (self._annex_cells if form is not Form.RAW else 0)
        return settings_in(replace(self._settings, n_cells=n_cells), self._kv_format.kinds if self._kv_format else (), form)

    def close(self) -> None:
        """Free the cache and the model; safe to call twice."""
        if not self._closed:
            self._closed = True
            if self._annex is not None:
                self._annex.close()
            self._context.close()
            self._model.close()

    def _furnished(self) -> Annex | None:
        """An annex. That there is no memory for it is no reason not to go on: without it prompts are only slower."""
        assert self._kv_format is not None
        try:
            given = self._settings
            settings = replace(given, n_cells=given.annex_cells, n_ubatch=min(given.n_ubatch, ANNEX_UBATCH))
            context = Context(self._model, settings, Layout.UNIFIED, 1)
        except ModelError as error:
            log.warning("prompts are computed in the pool alone: %s", error)
            return None
        context.heed(self._brake)
        return Annex(context, PartTransfer(context, self._kv_format.form, self._kv_format.kinds, 0, self._bench))

    def _give_annex_up(self) -> None:
        """What is computed in another form is not computed in tiles, there or here; its bytes are worth more as cells."""
        if self._annex is not None:
            self._annex.close()
            self._annex = None

    def _take_annex_up(self) -> None:
        if self._annex_cells and self._annex is None and self.shape.form is Form.RAW and not self._context.closed:
            self._annex = self._furnished()
            self._shape = self._shape_of(self._context)

    def _shape_of(self, context: Context) -> PoolShape:
        """In streams a prompt is alone anyway."""
        has_annex = self._annex is not None and context.shape.layout is Layout.UNIFIED
        return replace(context.shape, annex_cells=self._annex_cells if has_annex else 0)

    def _use(self, context: Context) -> None:
        self._context = context
        self._shape = self._shape_of(context)
        context.heed(self._brake)
        self._transfer: PartTransfer | StateTransfer = (
            StateTransfer(context)
            if self._kv_format is None
            else PartTransfer(context, self._kv_format.form, self._live_kinds(), self._model.window_tokens, self._bench)
        )

    def _live_kinds(self) -> tuple[CacheKind, ...]:
        return self._kinds_in(self.shape.form)

    def _kinds_in(self, form: Form) -> tuple[CacheKind, ...]:
        return kinds_in(self._kv_format.kinds, form) if self._kv_format else ()

    def _make_codec(self) -> LlamaCodec:
        fingerprint = kv_fingerprint(
            self._settings,
            architecture=self.model.architecture,
            long_rope=self._model.uses_long_rope(self.shape.cells_per_sequence),
        )
        kinds = self._kv_format.kinds if self._kv_format else ()
        return LlamaCodec(fingerprint, kinds, self._live_kinds, self._check_state)

    def _check_state(self, slab: StateSlab) -> None:
        if self._state_format is None:
            raise EngineError("this model's states have a form that cannot be checked")
        self._state_format.check(slab)

    def _carry_out(self, operation: CellOperation, saved: dict[int, Slab]) -> Transfer | None:
        """What was moved out of the cache or into it, where the operation does that."""
        began = time.perf_counter()
        if self._annex is not None:
            self._annex.heed(operation)
        match operation:
            case Copy(source, target, p0, p1):
                self._check_ids(source, target)
                self._transfer.copy(source, target, p0, p1)
            case Remove(sequence, p0, p1):
                self._check_ids(sequence)
                if not self._context.remove(sequence, p0, p1):
                    raise EngineError(f"sequence {sequence} keeps a running state that cannot be cut at {p0}")
            case Share(source, target, p0, p1):
                self._check_ids(source, target)
                self._transfer.swap_cells(source, target, p0, p1)
            case Compact(sequence, p0, p1):
                self._check_ids(sequence)
                self._transfer.compact(sequence, p0, p1)
            case Release():
                self._transfer.release()
            case Save(sequence, p0, p1, key):
                self._check_ids(sequence)
                saved[key] = slab = self._transfer.save(sequence, p0, p1)
                return Transfer(Direction.SAVE, p1 - p0, slab.n_bytes, time.perf_counter() - began)
            case Restore(sequence, slabs):
                self._check_ids(sequence)
                self._transfer.restore(sequence, slabs)
                n_bytes = sum(slab.n_bytes for slab in slabs)
                return Transfer(Direction.RESTORE, slabs[-1].p1 - slabs[0].p0, n_bytes, time.perf_counter() - began)
        return None

    def _check_open(self) -> None:
        if self._context.closed:
            raise EngineError("the engine has no live cache any more: it must be opened again")

    def _check_ids(self, *sequences: int) -> None:
        for sequence in sequences:
            if not 0 <= sequence < self.shape.n_seqs:
                raise EngineError(f"there is no sequence {sequence}: ids are below {self.shape.n_seqs}")

    def _check_works(self, works: Sequence[Work]) -> None:
        sequences = [work.sequence for work in works]
        self._check_ids(*sequences)
        if len(set(sequences)) != len(sequences):
            raise EngineError("one sequence has two works in one step")
        if not all(len(work.tokens) for work in works):
            raise EngineError("a work without tokens")

    def _draw(self, works: Sequence[Work], rows: Logits, refused: dict[SeqId, RequestError]) -> dict[SeqId, Sample]:
        """A token for every work that wants one. Fills `refused` with those for which there is none."""
        drawing = [(work, work.sampler) for work in works if work.sampler is not None]
        samplers = [sampler for _, sampler in drawing if isinstance(sampler, LlamaSampler)]
        if len(samplers) != len(drawing):
            raise EngineError("a work brings a sampler of another engine")
        if all(sampler.is_greedy and sampler.takes_row_as_it_is for sampler in samplers):
            tokens = rows.argmax(axis=1).tolist() if len(rows) else []
            drawn = zip(drawing, tokens, rows, strict=True)
            return {work.sequence: _sample(work, token, row) for (work, _), token, row in drawn}
        samples: dict[SeqId, Sample] = {}
        for (work, _), sampler, row in zip(drawing, samplers, rows, strict=True):
            try:
                samples[work.sequence] = _sample(work, sampler.draw(row), row, is_last=sampler.ended)
            except RequestError as error:
                refused[work.sequence] = error
        return samples

    def _failure(self, code: int, works: Sequence[Work], saved: dict[int, Slab], decode_seconds: float) -> StepResult:
        lost = frozenset(work.sequence for work in works if not self._cut_back(work))
        if code == _INVALID_BATCH:
            raise EngineError("llama_decode refused the batch as invalid: a token or a position is impossible")
        outcome = Outcome.NO_ROOM if code == NO_SLOT and not lost else Outcome.FAILED
        if code == ABORTED and self._brake.is_set:
            outcome = Outcome.INTERRUPTED
        return StepResult(outcome, {}, saved, decode_seconds, lost=lost)

    def _cut_back(self, work: Work) -> bool:
        """False: the sequence could not be cut and was emptied."""
        if self._context.length(work.sequence) <= work.start or self._context.remove(work.sequence, work.start):
            return True
        self._context.remove(work.sequence)
        return False


def _sample(work: Work, token: int, row: Logits, *, is_last: bool = False) -> Sample:
    logprobs = None if work.n_logprobs is None else log_probabilities(row, token, work.n_logprobs)
    return Sample(token, logprobs, is_last)


def _batches(works: Sequence[Work], n_batch: int) -> Iterator[list[Piece]]:
    """The works in order, cut so that no batch is larger than `n_batch`."""
    batch: list[Piece] = []
    room = n_batch
    for work in works:
        done, n_tokens = 0, len(work.tokens)
        while done < n_tokens:
            if not room:
                yield batch
                batch, room = [], n_batch
            count = min(room, n_tokens - done)
            tokens = work.tokens if count == n_tokens else work.tokens[done : done + count]
            wants_logits = work.sampler is not None and done + count == n_tokens
            n_pads = work.pad_tokens if count == n_tokens and count + work.pad_tokens <= room else 0
            batch.append(Piece(work.sequence, tokens, work.start + done, wants_logits, n_pads))
            done += count
            room -= count + n_pads
    if batch:
        yield batch
