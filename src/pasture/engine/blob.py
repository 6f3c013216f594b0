"""llama.cpp's state blob of one sequence, taken apart into rows; `pasture.engine.assembly` puts rows together again.

    u32 magic | i32 seq_id | cache [| cache ...]
    cache:   u32 n_stream | stream * n_stream
    stream:  u32 n_cells | (nothing more when 0) | cell * n_cells | u32 v_trans | u32 n_layer | K * n_layer | V * n_layer
    cell:    i32 position | u32 n_seq_id = 1 | [12 bytes with M-RoPE] | i32 seq_id
    K, V:    i32 type | u64 row_size | n_cells rows

A sequence lives in one stream, so at most one stream of a cache is not empty, and which one it was does not matter: the
library restores into the stream of the destination. That makes a slab independent of the layout it was saved in. Rows come
in cell order; a slab keeps them in position order. Sliding-window models have two caches. Values are token-major only with
flash attention (v_trans = 0); a transposed blob is refused.

The library aborts the process on some damaged blobs, so everything is checked here before it gets one. Stateless; slabs are
immutable views, safe on any thread. Source: src/llama-kv-cache.cpp, `state_write` and `state_read`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pasture.core.errors import EngineError
from pasture.core.storage import Bytes
from pasture.core.values import Slab

MAGIC = 0xAF143CD8
HEADER = struct.Struct("<Ii")
"""magic, sequence id"""
U32 = struct.Struct("<I")
LAYERS = struct.Struct("<II")
"""v_trans, n_layer"""
TENSOR = struct.Struct("<iQ")
"""type, row_size"""
_MAX_STREAMS = 256
MAX_LAYERS = 4096


@dataclass(frozen=True, slots=True)
class BlobFormat:
    """What the bytes alone do not say; found once per model by `detect_format`."""

    n_caches: int = 1
    ext_bytes: int = 0
    has_values: bool = True
    """False: latent attention keeps no V rows"""

    @property
    def cell_type(self) -> np.dtype[np.void]:
        ext = [("ext", "u1", (self.ext_bytes,))] if self.ext_bytes else []
        return np.dtype([("position", "<i4"), ("n_seq_id", "<u4"), *ext, ("seq_id", "<i4")])


@dataclass(frozen=True, slots=True)
class KvFormat:
    """One model's KV, as its first blob showed it."""

    form: BlobFormat
    kinds: tuple[CacheKind, ...]
    """in the configured types"""


class RowKind(NamedTuple):
    """What one row of a layer's K or V is."""

    ggml_type: int
    row_size: int
    """bytes"""


@dataclass(frozen=True, slots=True)
class CacheKind:
    """What one cache's rows are; caches of equal kind can be joined."""

    ext_bytes: int
    keys: tuple[RowKind, ...]
    values: tuple[RowKind, ...]

    @property
    def rows(self) -> tuple[RowKind, ...]:
        return self.keys + self.values


@dataclass(frozen=True, slots=True)
class Rows:
    """One layer's K or V: `(n_cells, row_size) uint8`, in position order."""

    ggml_type: int
    data: Bytes

    @property
    def kind(self) -> RowKind:
        return RowKind(self.ggml_type, int(self.data.shape[1]))


@dataclass(frozen=True, slots=True)
class CacheRows:
    """One cache's share of a slab."""

    positions: NDArray[np.int32]
    ext: Bytes
    """`(n_cells, ext_bytes)`"""
    keys: tuple[Rows, ...]
    values: tuple[Rows, ...]

    @property
    def n_cells(self) -> int:
        return len(self.positions)

    @property
    def tensors(self) -> tuple[Rows, ...]:
        return self.keys + self.values

    @property
    def kind(self) -> CacheKind:
        return CacheKind(int(self.ext.shape[1]), tuple(r.kind for r in self.keys), tuple(r.kind for r in self.values))

    def between(self, p0: int, p1: int) -> CacheRows:
        """The rows at positions `[p0, p1)`, as views."""
        first, last = (int(i) for i in np.searchsorted(self.positions, (p0, p1)))
        return self._take(slice(first, last))

    def _take(self, which: slice | NDArray[np.intp]) -> CacheRows:
        return CacheRows(
            self.positions[which],
            self.ext[which],
            tuple(Rows(rows.ggml_type, rows.data[which]) for rows in self.keys),
            tuple(Rows(rows.ggml_type, rows.data[which]) for rows in self.values),
        )

    def in_position_order(self) -> CacheRows:
        """Sorted by position; a copy only where cells were out of order."""
        steps = np.diff(self.positions)
        if bool(np.all(steps > 0)):
            return self
        order = np.argsort(self.positions, kind="stable")
        if bool(np.any(np.diff(self.positions[order]) == 0)):
            raise EngineError("state blob: two cells of one sequence claim the same position")
        return self._take(order)


@dataclass(frozen=True, slots=True)
class KvSlab(Slab):
    """KV rows of `[p0, p1)`, every position present in every cache."""

    p0: int
    p1: int
    caches: tuple[CacheRows, ...]
    blob: Bytes | None = field(default=None, repr=False, compare=False)
    """the whole blob the rows are views of, where they are all of it: it goes back without being put together"""

    def __post_init__(self) -> None:
        if self.p0 < 0 or self.p1 < self.p0:
            raise EngineError(f"no slab covers [{self.p0}, {self.p1})")
        for cache in self.caches:
            whole = cache.n_cells == self.p1 - self.p0
            if not whole or (cache.n_cells and (cache.positions[0] != self.p0 or cache.positions[-1] != self.p1 - 1)):
                raise EngineError(f"a slab of [{self.p0}, {self.p1}) lacks some of its cells: it has {cache.n_cells}")

    @property
    def n_bytes(self) -> int:
        return sum(rows.data.nbytes for cache in self.caches for rows in cache.tensors)

    @property
    def kinds(self) -> tuple[CacheKind, ...]:
        return tuple(cache.kind for cache in self.caches)

    def cut(self, p0: int, p1: int) -> KvSlab:
        """The part `[p0, p1)` as views of this slab's memory. Raises EngineError outside of it."""
        if (p0, p1) == (self.p0, self.p1):
            return self
        if not self.p0 <= p0 <= p1 <= self.p1:
            raise EngineError(f"[{p0}, {p1}) is not a part of the slab [{self.p0}, {self.p1})")
        return KvSlab(p0, p1, tuple(cache.between(p0, p1) for cache in self.caches))


@dataclass(frozen=True, slots=True)
class StateSlab(Slab):
    """A recurrent or hybrid model's whole sequence `[0, p1)`, as the library wrote it. It cannot be cut."""

    p0: int
    p1: int
    blob: Bytes
    n_streams: int
    """of the layout it was saved in; it can be restored in no other"""

    @property
    def n_bytes(self) -> int:
        return self.blob.nbytes

    def cut(self, p0: int, p1: int) -> StateSlab:
        if (p0, p1) == (self.p0, self.p1):
            return self
        raise EngineError(f"a running state has no part [{p0}, {p1}): it can only be kept whole")


class Cursor:
    """Reads a blob from its beginning; raises EngineError where it ends too soon."""

    def __init__(self, blob: Bytes) -> None:
        self._blob = blob
        self.offset = 0

    @property
    def left(self) -> int:
        return len(self._blob) - self.offset

    def take(self, count: int) -> Bytes:
        if count > self.left:
            raise EngineError(f"state blob: {count} bytes expected at {self.offset}, {self.left} are left")
        part = self._blob[self.offset : self.offset + count]
        self.offset += count
        return part

    def unpack(self, layout: struct.Struct) -> tuple[int, ...]:
        return layout.unpack(self.take(layout.size).tobytes())


def parse(blob: Bytes | bytes, form: BlobFormat) -> tuple[CacheRows, ...]:
    """The caches of one sequence's blob, rows as views of `blob`. Raises EngineError on anything unexpected."""
    cursor = Cursor(np.frombuffer(blob, np.uint8))
    magic, _seq_id = cursor.unpack(HEADER)
    if magic != MAGIC:
        raise EngineError(f"state blob: it begins with {magic:#010x} instead of {MAGIC:#010x}")
    caches = tuple(_parse_cache(cursor, form) for _ in range(form.n_caches))
    if cursor.left:
        raise EngineError(f"state blob: {cursor.left} bytes follow its end")
    return caches


def _parse_cache(cursor: Cursor, form: BlobFormat) -> CacheRows:
    (n_streams,) = cursor.unpack(U32)
    if not 1 <= n_streams <= _MAX_STREAMS:
        raise EngineError(f"state blob: {n_streams} streams")
    found: CacheRows | None = None
    for _ in range(n_streams):
        (n_cells,) = cursor.unpack(U32)
        if not n_cells:
            continue
        if found is not None:
            raise EngineError("state blob: one sequence lives in two streams")
        found = _parse_stream(cursor, n_cells, form)
    if found is None:
        return CacheRows(np.empty(0, np.int32), np.empty((0, form.ext_bytes), np.uint8), (), ())
    return found.in_position_order()


def _parse_stream(cursor: Cursor, n_cells: int, form: BlobFormat) -> CacheRows:
    cell_type = form.cell_type
    cells = cursor.take(n_cells * cell_type.itemsize).view(cell_type)
    if not bool(np.all(cells["n_seq_id"] == 1)):
        raise EngineError("state blob: a cell of another number of sequences than one")
    positions: NDArray[np.int32] = np.ascontiguousarray(cells["position"])
    if bool(np.any(positions < 0)):
        raise EngineError("state blob: a negative position")
    ext = np.ascontiguousarray(cells["ext"]) if form.ext_bytes else np.empty((n_cells, 0), np.uint8)
    transposed, n_layers = cursor.unpack(LAYERS)
    if transposed:
        raise EngineError("state blob: values are stored transposed; flash attention must be on")
    if n_layers > MAX_LAYERS:
        raise EngineError(f"state blob: {n_layers} layers")
    keys = tuple(_parse_rows(cursor, n_cells) for _ in range(n_layers))
    values = tuple(_parse_rows(cursor, n_cells) for _ in range(n_layers if form.has_values else 0))
    return CacheRows(positions, ext, keys, values)


def _parse_rows(cursor: Cursor, n_cells: int) -> Rows:
    ggml_type, row_size = cursor.unpack(TENSOR)
    if ggml_type < 0 or row_size < 1:
        raise EngineError(f"state blob: rows of type {ggml_type} and {row_size} bytes")
    return Rows(ggml_type, cursor.take(n_cells * row_size).reshape(n_cells, row_size))


def slab_of(blob: Bytes, form: BlobFormat, p0: int, p1: int) -> KvSlab:
    """The slab of a blob that holds exactly `[p0, p1)`. Raises EngineError when it does not."""
    return KvSlab(p0, p1, parse(blob, form), blob)


def detect_format(blob: Bytes | bytes, n_cells: int) -> BlobFormat | None:
    """The one format in which `blob` is a sequence of `[0, n_cells)`; None where it is none we know."""
    for n_caches in (1, 2, 3):
        for ext_bytes in (0, 12):
            for has_values in (True, False):
                form = BlobFormat(n_caches, ext_bytes, has_values)
                try:
                    KvSlab(0, n_cells, parse(blob, form))
                except EngineError:
                    continue
                return form
    return None
