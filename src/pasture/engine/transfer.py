"""Parts of sequences in and out of the live cache, exactly, in both layouts.

Unified. A part `[p0, p1)` is joined by the scratch sequence, saved as the scratch's whole state, and left again; it comes
back the same way. A sliding-window cache saves only what its window shows from the sequence's end, so such a model's part
is saved in pieces that each lie inside one window:

    sequence  0 ------------ p0 ==========|==========|====== p1 -----
    scratch                     [ piece 0 )[ piece 1 )[  2  )            each saved alone, then joined

Streams. Cells cannot be shared across streams and a restore replaces the whole stream, so the whole sequence is saved and
rows are sliced; a part goes in as (what was there) + (the part). A sliding-window model's older rows are uncovered by
cutting the sequence back window by window, and the whole is restored afterwards.

Owns nothing; works on a `Context` from the engine thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from pasture.core.errors import EngineError
from pasture.core.storage import Bytes
from pasture.core.values import Layout, Slab
from pasture.engine.assembly import Workbench, assemble, concatenate, join_caches
from pasture.engine.blob import BlobFormat, CacheKind, CacheRows, KvSlab, StateSlab, parse, slab_of
from pasture.engine.context import WINDOW_STATE_ONLY, Context


class PartTransfer:
    """Save, restore and copy for models whose sequences can be cut anywhere."""

    def __init__(
        self, context: Context, form: BlobFormat, kinds: Sequence[CacheKind], window_tokens: int, bench: Workbench
    ) -> None:
        """`bench`: for one blob at a time, whoever's."""
        self._context = context
        self._bench = bench
        self._form = form
        self._kinds = tuple(kinds)
        """of the live cache; slabs that hold other types are converted as they go in"""
        self._piece_tokens = max(1, window_tokens // 2) if window_tokens and form.n_caches > 1 else None
        """half a window, so that pieces suit standard, symmetric and chunked windows alike"""

    def save(self, sequence: int, p0: int, p1: int) -> KvSlab:
        """The KV of `[p0, p1)`, copied out. Raises EngineError when the sequence does not hold it all."""
        length = self._context.length(sequence)
        if not 0 <= p0 < p1 <= length:
            raise EngineError(f"sequence {sequence} holds [0, {length}), so [{p0}, {p1}) cannot be saved")
        if self._context.shape.layout is Layout.STREAMS:
            return self._save_stream(sequence, length).cut(p0, p1)
        if (p0, p1) == (0, length) and self._piece_tokens is None:
            return self._parsed(sequence, p0, p1)
        return concatenate([self._save_piece(sequence, a, b) for a, b in self._pieces(p0, p1)])

    def restore(self, sequence: int, slabs: Sequence[Slab]) -> None:
        """Put neighbouring slabs behind the sequence's `[0, slabs[0].p0)`. Raises EngineError when there is no room."""
        p0, p1 = slabs[0].p0, slabs[-1].p1
        parts = [slab for slab in slabs if isinstance(slab, KvSlab)]
        if len(parts) != len(slabs):
            raise EngineError("a slab of another kind of model cannot be restored here")
        length = self._context.length(sequence)
        if length != p0:
            raise EngineError(f"sequence {sequence} holds [0, {length}): a slab of [{p0}, {p1}) does not continue it")
        if p0 == p1:
            return
        if self._context.shape.layout is Layout.UNIFIED:
            self.share([sequence], parts)
        else:
            held = [self._save_stream(sequence, length)] if length else []
            self._context.write_state(sequence, self._blob([*held, *parts]))

    def share(self, holders: Sequence[int], slabs: Sequence[KvSlab]) -> None:
        """Put slabs into cells once and let every holder join them, portion by portion. Unified layout.

        Raises EngineError, with the holders as they were, when there is no room.
        """
        scratch = self._hidden(self._context.scratch)
        for portion in self._portions(slabs):
            try:
                self._context.write_state(scratch, self._blob(portion))
            except EngineError:
                for holder in holders:
                    self._context.remove(holder, slabs[0].p0)
                raise
            for holder in holders:
                self._context.join(scratch, holder, portion[0].p0, portion[-1].p1)
            self._context.remove(scratch)

    def _portions(self, slabs: Sequence[KvSlab]) -> Iterator[Sequence[KvSlab]]:
        """Neighbours that go in together: as many as the workbench has memory for; all, where a window looks over them."""
        portion: list[KvSlab] = []
        n_bytes = 0
        for slab in slabs:
            if portion and n_bytes + slab.n_bytes > Workbench.READY_BYTES and self._piece_tokens is None:
                yield portion
                portion, n_bytes = [], 0
            portion.append(slab)
            n_bytes += slab.n_bytes
        yield portion

    def copy(self, source: int, target: int, p0: int, p1: int) -> None:
        """Target holds source's `[p0, p1)` too: metadata in the unified layout, bytes in streams."""
        if self._context.shape.layout is Layout.UNIFIED:
            self._context.join(source, target, p0, p1)
        else:
            self.restore(target, [self.save(source, p0, p1)])

    def swap_cells(self, source: int, target: int, p0: int, p1: int) -> None:
        """Target leaves its own cells in `[p0, p1)` and joins source's, which hold the same tokens. Unified layout."""
        self._context.remove(target, p0, p1)
        self._context.join(source, target, p0, p1)

    def compact(self, sequence: int, p0: int, p1: int) -> None:
        """Write `[p0, p1)` anew, behind everything; no change where there is no room. Unified layout.

        The library fills its first free cells, one by one, so the old ones are held until `release`.
        """
        slab = self._save_piece(sequence, p0, p1)
        scratch, left = self._hidden(self._context.scratch), self._hidden(self._context.left)
        try:
            self._context.write_state(scratch, self._blob([slab]))
        except EngineError:
            return
        self._context.join(sequence, left, p0, p1)
        self.swap_cells(scratch, sequence, p0, p1)
        self._context.remove(scratch)

    def release(self) -> None:
        """Free what compactions left."""
        self._context.remove(self._hidden(self._context.left))

    def _blob(self, slabs: Sequence[KvSlab]) -> Bytes:
        return assemble(slabs, n_streams=self._context.n_streams, kinds=self._kinds, allocate=self._bench.allocate)

    @staticmethod
    def _hidden(sequence: int | None) -> int:
        if sequence is None:
            raise EngineError("this layout has no hidden sequences")
        return sequence

    def _parsed(self, sequence: int, p0: int, p1: int) -> KvSlab:
        return slab_of(self._context.read_state(sequence), self._form, p0, p1)

    def _pieces(self, p0: int, p1: int) -> list[tuple[int, int]]:
        step = self._piece_tokens
        if step is None:
            return [(p0, p1)]
        edges = [p0, *range((p0 // step + 1) * step, p1, step), p1]
        return list(pairwise(edges))

    def _save_piece(self, sequence: int, p0: int, p1: int) -> KvSlab:
        scratch = self._hidden(self._context.scratch)
        self._context.join(sequence, scratch, p0, p1)
        try:
            return self._parsed(scratch, p0, p1)
        finally:
            self._context.remove(scratch)

    def _save_stream(self, sequence: int, length: int) -> KvSlab:
        """A whole stream; rewrites it where a window hid some rows."""
        blob = self._context.read_state(sequence)
        base, *others = parse(blob, self._form)
        if all(cache.n_cells == length for cache in others):
            return KvSlab(0, length, (base, *others), blob)
        whole = KvSlab(0, length, (base, self._uncover(sequence, others[0])))
        self._context.write_state(sequence, self._blob([whole]))
        return whole

    def _uncover(self, sequence: int, window: CacheRows) -> CacheRows:
        parts = [window]
        form = BlobFormat(1, self._form.ext_bytes, self._form.has_values)
        while (first := int(parts[0].positions[0])) > 0:
            self._context.remove(sequence, first)
            (older,) = parse(self._context.read_state(sequence, flags=WINDOW_STATE_ONLY), form)
            if not older.n_cells or int(older.positions[-1]) != first - 1:
                raise EngineError(f"sequence {sequence} has lost window cells before position {first}")
            parts.insert(0, older)
        return join_caches(parts)


class StateTransfer:
    """Save, restore and copy for recurrent and hybrid models: whole sequences, or nothing."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def save(self, sequence: int, p0: int, p1: int) -> StateSlab:
        length = self._context.length(sequence)
        if p0 != 0 or p1 != length or not length:
            raise EngineError(f"sequence {sequence} keeps a running state of [0, {length}): [{p0}, {p1}) cannot be saved")
        return StateSlab(p0, p1, self._context.read_state(sequence), self._context.n_streams)

    def restore(self, sequence: int, slabs: Sequence[Slab]) -> None:
        (slab,) = slabs
        if not isinstance(slab, StateSlab):
            raise EngineError("a running state can only be restored from its own whole slab")
        if slab.n_streams != self._context.n_streams:
            raise EngineError("a running state cannot move to another layout")
        if self._context.length(sequence):
            raise EngineError(f"sequence {sequence} is not empty: a running state cannot continue it")
        self._context.write_state(sequence, slab.blob)

    def compact(self, sequence: int, p0: int, p1: int) -> None:
        raise EngineError(f"[{p0}, {p1}) of {sequence}'s running state is in one piece already")

    def release(self) -> None:
        raise EngineError("a running state is never moved in part")

    def swap_cells(self, source: int, target: int, p0: int, p1: int) -> None:
        raise EngineError(f"a running state has no cells that [{p0}, {p1}) of {target} and {source} could share")

    def copy(self, source: int, target: int, p0: int, p1: int) -> None:
        if (p0, p1) != (0, self._context.length(source)):
            raise EngineError(f"[{p0}, {p1}) of a running state cannot be copied, only the whole")
        if self._context.length(target):
            raise EngineError(f"sequence {target} is not empty: a running state cannot continue it")
        if self._context.shape.layout is Layout.UNIFIED:
            self._context.copy_state(source, target)
        else:
            self.restore(target, [self.save(source, p0, p1)])
