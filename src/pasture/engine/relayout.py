"""Laying the whole live cache out anew: everything out, everything in, in an order that keeps neighbours together.

The moves of `LlamaEngine.rebuild`, and the memory that they take. Segments cover every used cell once, parents before
children; a segment is saved through its first holder. In the unified layout it goes into cells once and all its holders join
it; in streams each holder gets its own copy, its sequence put together from all the segments it holds. Stateless.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from pasture.core.errors import DoesNotFit, EngineError
from pasture.core.values import Form, Layout, PoolShape, Segment, SeqId, Slab
from pasture.engine.blob import CacheKind, KvSlab
from pasture.engine.blockcodec import kinds_in
from pasture.engine.context import max_sequences, plan_shape
from pasture.engine.memory import SPARE_BYTES, plan_memory
from pasture.engine.model import Model
from pasture.engine.settings import EngineSettings
from pasture.engine.transfer import PartTransfer, StateTransfer


def settings_in(settings: EngineSettings, kinds: Sequence[CacheKind], form: Form) -> EngineSettings:
    """The settings of a cache in another form, with as many cells as go into the configured bytes.

    Raises DoesNotFit where the form is not for this model: running states, types that are quantised (and rotated) already,
    rows without a whole number of the form's blocks.
    """
    if form is Form.RAW:
        return settings
    shifted = kinds_in(kinds, form) if form is Form.Q8_0 else kinds
    complete = all(a != b for old, new in zip(kinds, shifted, strict=True) for a, b in zip(old.rows, new.rows, strict=True))
    if not kinds or not complete or not {settings.type_k, settings.type_v} <= {"f32", "f16", "bf16"}:
        raise DoesNotFit(f"this model's live cache cannot be kept in {form}")
    before, after = (sum(row.row_size for kind in some for row in kind.rows) for some in (kinds, shifted))
    return replace(settings, type_k=form.value, type_v=form.value, n_cells=settings.n_cells * before // after)


def check_fit(
    model: Model, settings: EngineSettings, segments: Sequence[Segment], old: PoolShape, layout: Layout, n_seqs: int
) -> None:
    """Raises DoesNotFit when a layout of `n_seqs` sequences, made with `settings`, cannot hold the segments."""
    if n_seqs > max_sequences(model, layout):
        raise DoesNotFit(f"{n_seqs} sequences; this model can have {max_sequences(model, layout)} in the {layout} layout")
    if (layout, n_seqs) != (old.layout, old.n_seqs) and segments and not model.info.shareable:
        raise DoesNotFit("a recurrent or hybrid model's sequences cannot move to another layout")
    shape = plan_shape(settings, layout, n_seqs, old.form, n_hidden=0)
    if model.uses_long_rope(shape.cells_per_sequence) != model.uses_long_rope(old.cells_per_sequence):
        raise DoesNotFit(f"sequences of {shape.cells_per_sequence} cells are computed with other rope factors")
    lengths: dict[SeqId, int] = defaultdict(int)
    for segment in segments:
        for holder in segment.holders:
            lengths[holder] = max(lengths[holder], segment.p1)
    for holder, length in lengths.items():
        if holder >= n_seqs:
            raise DoesNotFit(f"sequence {holder} has no place among {n_seqs}")
        if length > shape.cells_per_sequence:
            raise DoesNotFit(
                f"sequence {holder} of {length} tokens is longer than the {shape.cells_per_sequence} a stream holds"
            )
    total = sum(segment.p1 - segment.p0 for segment in segments)
    if layout is Layout.UNIFIED and total > shape.n_cells:
        raise DoesNotFit(f"{total} cells in use do not fit into {shape.n_cells}")


@dataclass(frozen=True, slots=True)
class Sketch:
    """A cache, as far as its bytes go."""

    settings: EngineSettings
    kinds: Sequence[CacheKind]
    """none for a model whose states are kept whole"""
    layout: Layout
    n_seqs: int

    @property
    def cell_bytes(self) -> int:
        return sum(row.row_size for kind in self.kinds for row in kind.rows)

    def context_bytes(self, model: Model) -> int:
        """Everything but the weights and the annex, which are there."""
        info = replace(model.info, cell_bytes=self.cell_bytes or model.info.cell_bytes, n_bytes=0, n_params=0)
        plan = plan_memory(info, replace(self.settings, n_seqs=self.n_seqs, annex_cells=0), n_embd=model.n_embd, available=0)
        return plan.needed_bytes(self.settings.n_cells)


@dataclass(frozen=True, slots=True)
class Room:
    """Host memory that a rebuild takes for a while, generously: an allocation that is too large rarely fails, it is killed."""

    beside_bytes: int
    """with the new cache beside the old one"""
    through_memory_bytes: int
    """with what is in use out of the old cache before the new one is made"""
    in_place_bytes: int
    """the same, back into the same cache"""

    @classmethod
    def of(cls, segments: Sequence[Segment], model: Model, old: Sketch, new: Sketch) -> Room:
        in_use = _gathered_bytes(segments, old)
        # one by one into cells that all holders join; a stream is put together from all its segments
        at_once = max((s.p1 - s.p0 for s in segments), default=0) * old.cell_bytes if new.layout is Layout.UNIFIED else in_use
        made, freed = new.context_bytes(model), old.context_bytes(model)
        spare = SPARE_BYTES if segments else 0
        return cls(made + at_once, in_use + max(spare, made - freed), in_use + spare)


def _gathered_bytes(segments: Sequence[Segment], old: Sketch) -> int:
    """Of everything that `gather` saves; a stream is saved whole for each of its segments, and a part keeps the whole alive."""
    if old.layout is Layout.UNIFIED:
        return sum(segment.p1 - segment.p0 for segment in segments) * old.cell_bytes
    lengths = {segment.holders[0]: 0 for segment in segments}
    for segment in segments:
        for holder in segment.holders:
            if holder in lengths:
                lengths[holder] = max(lengths[holder], segment.p1)
    return sum(lengths[segment.holders[0]] for segment in segments) * old.cell_bytes


def gather(transfer: PartTransfer | StateTransfer, segments: Sequence[Segment]) -> Iterator[Slab]:
    """Every segment's KV, in order, each saved when it is asked for."""
    for segment in segments:
        if not segment.holders:
            raise EngineError(f"nobody holds the segment [{segment.p0}, {segment.p1})")
        yield transfer.save(segment.holders[0], segment.p0, segment.p1)


def fill(transfer: PartTransfer | StateTransfer, segments: Sequence[Segment], slabs: Iterable[Slab], layout: Layout) -> None:
    """Put every segment into an empty cache; in the unified layout, `slabs` is read one by one as they go in."""
    if isinstance(transfer, StateTransfer):
        for segment, slab in zip(segments, slabs, strict=True):
            for holder in segment.holders:
                transfer.restore(holder, [slab])
        return
    parts = (slab for slab in slabs if isinstance(slab, KvSlab))
    if layout is Layout.UNIFIED:
        for segment, part in zip(segments, parts, strict=True):
            transfer.share(segment.holders, [part])
        return
    owned: dict[SeqId, list[KvSlab]] = defaultdict(list)
    missing = Counter(holder for segment in segments for holder in segment.holders)
    for segment, part in zip(segments, parts, strict=True):
        for holder in segment.holders:
            owned[holder].append(part)
            missing[holder] -= 1
            if not missing[holder]:
                transfer.restore(holder, sorted(owned.pop(holder), key=lambda part: part.p0))
