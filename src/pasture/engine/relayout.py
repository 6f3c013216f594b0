"""Laying the whole live cache out anew: everything out, everything in, in an order that keeps neighbours together.

The three moves of `LlamaEngine.rebuild`. Segments cover every used cell once, parents before children; a segment is saved
through its first holder. In the unified layout it goes into cells once and all its holders join it; in streams each holder
gets its own copy, its sequence put together from all the segments it holds. Stateless.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from pasture.core.errors import DoesNotFit, EngineError
from pasture.core.values import Layout, Segment, SeqId, Slab
from pasture.engine.blob import KvSlab
from pasture.engine.context import max_sequences, plan_shape
from pasture.engine.model import Model
from pasture.engine.settings import EngineSettings
from pasture.engine.transfer import PartTransfer, StateTransfer


def check_fit(
    model: Model, settings: EngineSettings, segments: Sequence[Segment], layout: Layout, n_seqs: int, *, moves: bool
) -> None:
    """Raises DoesNotFit when a layout of `n_seqs` sequences cannot hold the segments."""
    if n_seqs > max_sequences(model, layout):
        raise DoesNotFit(f"{n_seqs} sequences; this model can have {max_sequences(model, layout)} in the {layout} layout")
    if moves and segments and not model.info.shareable:
        raise DoesNotFit("a recurrent or hybrid model's sequences cannot move to another layout")
    shape = plan_shape(settings, layout, n_seqs, n_hidden=0)
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


def gather(transfer: PartTransfer | StateTransfer, segments: Sequence[Segment]) -> list[Slab]:
    """Every segment's KV, in order."""
    slabs: list[Slab] = []
    for segment in segments:
        if not segment.holders:
            raise EngineError(f"nobody holds the segment [{segment.p0}, {segment.p1})")
        slabs.append(transfer.save(segment.holders[0], segment.p0, segment.p1))
    return slabs


def fill(transfer: PartTransfer | StateTransfer, segments: Sequence[Segment], slabs: Sequence[Slab], layout: Layout) -> None:
    """Put every segment into an empty cache."""
    if isinstance(transfer, StateTransfer):
        for segment, slab in zip(segments, slabs, strict=True):
            for holder in segment.holders:
                transfer.restore(holder, [slab])
        return
    parts = [slab for slab in slabs if isinstance(slab, KvSlab)]
    if layout is Layout.UNIFIED:
        for segment, part in zip(segments, parts, strict=True):
            transfer.share(segment.holders, [part])
        return
    owned: dict[SeqId, list[KvSlab]] = defaultdict(list)
    for segment, part in zip(segments, parts, strict=True):
        for holder in segment.holders:
            owned[holder].append(part)
    for holder, own in owned.items():
        transfer.restore(holder, sorted(own, key=lambda part: part.p0))
