"""llama.cpp's state blob of one sequence, taken apart into rows and put together again.

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pasture.core.errors import EngineError
from pasture.core.values import Slab

Bytes = NDArray[np.uint8]

MAGIC = 0xAF143CD8
_HEADER = struct.Struct("<Ii")
_U32 = struct.Struct("<I")
_LAYERS = struct.Struct("<II")
_TENSOR = struct.Struct("<iQ")
_MAX_STREAMS = 256
_MAX_LAYERS = 4096


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
class Rows:
    """One layer's K or V: `(n_cells, row_size) uint8`, in position order."""

    ggml_type: int
    data: Bytes

    @property
    def row_size(self) -> int:
        return int(self.data.shape[1])


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
    def signature(self) -> tuple[object, ...]:
        """Equal for caches that can be joined."""
        kinds = tuple((rows.ggml_type, rows.row_size) for rows in self.tensors)
        return (self.ext.shape[1], len(self.keys), kinds)

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


class _Cursor:
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
    cursor = _Cursor(np.frombuffer(blob, np.uint8))
    magic, _seq_id = cursor.unpack(_HEADER)
    if magic != MAGIC:
        raise EngineError(f"state blob: it begins with {magic:#010x} instead of {MAGIC:#010x}")
    caches = tuple(_parse_cache(cursor, form) for _ in range(form.n_caches))
    if cursor.left:
        raise EngineError(f"state blob: {cursor.left} bytes follow its end")
    return caches


def _parse_cache(cursor: _Cursor, form: BlobFormat) -> CacheRows:
    (n_streams,) = cursor.unpack(_U32)
    if not 1 <= n_streams <= _MAX_STREAMS:
        raise EngineError(f"state blob: {n_streams} streams")
    found: CacheRows | None = None
    for _ in range(n_streams):
        (n_cells,) = cursor.unpack(_U32)
        if not n_cells:
            continue
        if found is not None:
            raise EngineError("state blob: one sequence lives in two streams")
        found = _parse_stream(cursor, n_cells, form)
    if found is None:
        return CacheRows(np.empty(0, np.int32), np.empty((0, form.ext_bytes), np.uint8), (), ())
    return found.in_position_order()


def _parse_stream(cursor: _Cursor, n_cells: int, form: BlobFormat) -> CacheRows:
    cell_type = form.cell_type
    cells = cursor.take(n_cells * cell_type.itemsize).view(cell_type)
    if not bool(np.all(cells["n_seq_id"] == 1)):
        raise EngineError("state blob: a cell of another number of sequences than one")
    positions: NDArray[np.int32] = np.ascontiguousarray(cells["position"])
    if bool(np.any(positions < 0)):
        raise EngineError("state blob: a negative position")
    ext = np.ascontiguousarray(cells["ext"]) if form.ext_bytes else np.empty((n_cells, 0), np.uint8)
    transposed, n_layers = cursor.unpack(_LAYERS)
    if transposed:
        raise EngineError("state blob: values are stored transposed; flash attention must be on")
    if n_layers > _MAX_LAYERS:
        raise EngineError(f"state blob: {n_layers} layers")
    keys = tuple(_parse_rows(cursor, n_cells) for _ in range(n_layers))
    values = tuple(_parse_rows(cursor, n_cells) for _ in range(n_layers if form.has_values else 0))
    return CacheRows(positions, ext, keys, values)


def _parse_rows(cursor: _Cursor, n_cells: int) -> Rows:
    ggml_type, row_size = cursor.unpack(_TENSOR)
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


def join_caches(parts: Sequence[CacheRows]) -> CacheRows:
    """One cache out of parts in position order."""
    if len(parts) == 1:
        return parts[0]
    for before, after in pairwise(parts):
        if before.signature != after.signature:
            raise EngineError("slabs of different models or KV types cannot be joined")
    return CacheRows(
        np.concatenate([part.positions for part in parts]),
        np.concatenate([part.ext for part in parts]),
        tuple(_join_rows([part.keys[i] for part in parts]) for i in range(len(parts[0].keys))),
        tuple(_join_rows([part.values[i] for part in parts]) for i in range(len(parts[0].values))),
    )


def _join_rows(parts: Sequence[Rows]) -> Rows:
    return Rows(parts[0].ggml_type, np.concatenate([part.data for part in parts]))


def concatenate(slabs: Sequence[KvSlab]) -> KvSlab:
    """One slab out of neighbours, copied. Raises EngineError where they do not touch or do not match."""
    _check_neighbours(slabs)
    if len(slabs) == 1:
        return slabs[0]
    return KvSlab(slabs[0].p0, slabs[-1].p1, tuple(map(join_caches, _by_cache(slabs))))


def _check_neighbours(slabs: Sequence[KvSlab]) -> None:
    if not slabs:
        raise EngineError("no slab to work with")
    for before, after in pairwise(slabs):
        if before.p1 != after.p0:
            raise EngineError(f"slabs [{before.p0}, {before.p1}) and [{after.p0}, {after.p1}) do not touch")
        if len(before.caches) != len(after.caches):
            raise EngineError("slabs of different models cannot be joined")
        if any(a.signature != b.signature for a, b in zip(before.caches, after.caches, strict=True)):
            raise EngineError("slabs of different models or KV types cannot be joined")


def _by_cache(slabs: Sequence[KvSlab]) -> Iterator[list[CacheRows]]:
    return (list(parts) for parts in zip(*(slab.caches for slab in slabs), strict=True))


def assemble(slabs: Sequence[KvSlab], *, n_streams: int) -> Bytes:
    """The blob of neighbouring slabs for a cache of `n_streams`; each row is copied once, a whole blob not at all."""
    slabs = [slab for slab in slabs if slab.p1 > slab.p0]
    if len(slabs) == 1 and slabs[0].blob is not None and _streams_of(slabs[0].blob) == n_streams:
        return slabs[0].blob
    _check_neighbours(slabs)
    caches = list(_by_cache(slabs))
    blob = np.empty(_HEADER.size + sum(_cache_bytes(parts, n_streams) for parts in caches), np.uint8)
    _HEADER.pack_into(blob.data, 0, MAGIC, 0)
    offset = _HEADER.size
    for parts in caches:
        offset = _write_cache(blob, offset, parts, n_streams)
    return blob


def _streams_of(blob: Bytes) -> int:
    return int(_U32.unpack_from(blob.data, _HEADER.size)[0])


def _cell_type(cache: CacheRows) -> np.dtype[np.void]:
    return BlobFormat(ext_bytes=int(cache.ext.shape[1])).cell_type


def _cache_bytes(parts: Sequence[CacheRows], n_streams: int) -> int:
    n_cells = sum(part.n_cells for part in parts)
    rows = sum(_TENSOR.size + n_cells * rows.row_size for rows in parts[0].tensors)
    return _U32.size * (1 + n_streams) + n_cells * _cell_type(parts[0]).itemsize + _LAYERS.size + rows


def _write_cache(blob: Bytes, offset: int, parts: Sequence[CacheRows], n_streams: int) -> int:
    n_cells = sum(part.n_cells for part in parts)
    _U32.pack_into(blob.data, offset, n_streams)
    _U32.pack_into(blob.data, offset + _U32.size, n_cells)
    offset += 2 * _U32.size
    cells = np.zeros(n_cells, _cell_type(parts[0]))
    cells["position"] = np.concatenate([part.positions for part in parts])
    cells["n_seq_id"] = 1
    if parts[0].ext.shape[1]:
        cells["ext"] = np.concatenate([part.ext for part in parts])
    blob[offset : offset + cells.nbytes] = cells.view(np.uint8)
    offset += cells.nbytes
    _LAYERS.pack_into(blob.data, offset, 0, len(parts[0].keys))
    offset += _LAYERS.size
    for index, rows in enumerate(parts[0].tensors):
        _TENSOR.pack_into(blob.data, offset, rows.ggml_type, rows.row_size)
        offset += _TENSOR.size
        for part in parts:
            data = part.tensors[index].data
            blob[offset : offset + data.nbytes].reshape(data.shape)[...] = data
            offset += data.nbytes
    empty_streams = _U32.size * (n_streams - 1)
    blob[offset : offset + empty_streams] = 0
    return offset + empty_streams
