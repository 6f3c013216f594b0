"""Slabs put together: neighbours joined, and the blob that the library takes.

Each row is copied once, from wherever it lies to its place in the blob, and converted on the way where the slab holds
another type than the cache has now. Stateless.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from pasture.core.errors import EngineError
from pasture.core.storage import Bytes
from pasture.engine.blob import (
    HEADER,
    LAYERS,
    MAGIC,
    TENSOR,
    U32,
    BlobFormat,
    CacheKind,
    CacheRows,
    KvSlab,
    RowKind,
    Rows,
)
from pasture.engine.kernels import convert


def fresh(n_bytes: int) -> Bytes:
    return np.empty(n_bytes, np.uint8)


class Workbench:
    """Memory for one blob at a time, kept for the next.

    Fresh pages cost as much as the copy itself, or several times that where the machine is virtual and its host has to find
    them.
    """

    READY_BYTES = 8 << 20
    """that are there from the beginning"""
    KEPT_BYTES = 64 << 20
    """larger blobs get fresh memory"""

    def __init__(self) -> None:
        self._kept = np.ones(self.READY_BYTES, np.uint8)  # written to: pages that were only asked for are not there

    def allocate(self, n_bytes: int) -> Bytes:
        """Valid until the next call."""
        if n_bytes > self.KEPT_BYTES:
            return fresh(n_bytes)
        if n_bytes > self._kept.nbytes:
            self._kept = fresh(min(2 * n_bytes, self.KEPT_BYTES))
        return self._kept[:n_bytes]


def join_caches(parts: Sequence[CacheRows]) -> CacheRows:
    """One cache out of parts in position order."""
    if len(parts) == 1:
        return parts[0]
    for before, after in pairwise(parts):
        if before.kind != after.kind:
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


def _by_cache(slabs: Sequence[KvSlab]) -> Iterator[list[CacheRows]]:
    return (list(parts) for parts in zip(*(slab.caches for slab in slabs), strict=True))


def assemble(
    slabs: Sequence[KvSlab],
    *,
    n_streams: int,
    kinds: Sequence[CacheKind] = (),
    allocate: Callable[[int], Bytes] = fresh,
) -> Bytes:
    """The blob of neighbouring slabs for a cache of `n_streams`; each row is copied once, a whole blob not at all.

    Rows are converted to `kinds` on the way, where slabs hold other types; without `kinds`, to those of the first slab. The
    blob lies in what `allocate` gives for its size.
    """
    slabs = [slab for slab in slabs if slab.p1 > slab.p0]
    _check_neighbours(slabs)
    kinds = tuple(kinds) or slabs[0].kinds
    if len(kinds) != len(slabs[0].caches):
        raise EngineError("slabs of different models cannot be joined")
    whole = slabs[0].blob
    if len(slabs) == 1 and whole is not None and _streams_of(whole) == n_streams and slabs[0].kinds == kinds:
        return whole
    caches = list(zip(_by_cache(slabs), kinds, strict=True))
    n_cells = slabs[-1].p1 - slabs[0].p0
    blob = allocate(HEADER.size + sum(_cache_bytes(n_cells, kind, n_streams) for kind in kinds))
    HEADER.pack_into(blob.data, 0, MAGIC, 0)
    offset = HEADER.size
    for parts, kind in caches:
        offset = _write_cache(blob, offset, parts, kind, n_streams)
    return blob


def _streams_of(blob: Bytes) -> int:
    (n_streams,) = U32.unpack_from(blob.data, HEADER.size)
    return int(n_streams)


def _cell_type(kind: CacheKind) -> np.dtype[np.void]:
    return BlobFormat(ext_bytes=kind.ext_bytes).cell_type


def _cache_bytes(n_cells: int, kind: CacheKind, n_streams: int) -> int:
    rows = sum(TENSOR.size + n_cells * rows.row_size for rows in kind.rows)
    return U32.size * (1 + n_streams) + n_cells * _cell_type(kind).itemsize + LAYERS.size + rows


def _write_cache(blob: Bytes, offset: int, parts: Sequence[CacheRows], kind: CacheKind, n_streams: int) -> int:
    n_cells = sum(part.n_cells for part in parts)
    for part in parts:
        if (part.ext.shape[1], len(part.keys), len(part.values)) != (kind.ext_bytes, len(kind.keys), len(kind.values)):
            raise EngineError("slabs of different models cannot be joined")
    U32.pack_into(blob.data, offset, n_streams)
    U32.pack_into(blob.data, offset + U32.size, n_cells)
    offset += 2 * U32.size
    cells = np.zeros(n_cells, _cell_type(kind))
    cells["position"] = np.concatenate([part.positions for part in parts])
    cells["n_seq_id"] = 1
    if kind.ext_bytes:
        cells["ext"] = np.concatenate([part.ext for part in parts])
    blob[offset : offset + cells.nbytes] = cells.view(np.uint8)
    offset += cells.nbytes
    LAYERS.pack_into(blob.data, offset, 0, len(kind.keys))
    offset += LAYERS.size
    for row, *shares in zip(kind.rows, *(part.tensors for part in parts), strict=True):
        TENSOR.pack_into(blob.data, offset, *row)
        offset += TENSOR.size
        end = offset + n_cells * row.row_size
        _write_rows(blob[offset:end], shares, row)
        offset = end
    empty_streams = U32.size * (n_streams - 1)
    blob[offset : offset + empty_streams] = 0
    return offset + empty_streams


def _write_rows(target: Bytes, shares: Sequence[Rows], kind: RowKind) -> None:
    """One tensor's rows from all parts, in `kind`."""
    if all(rows.ggml_type == kind.ggml_type for rows in shares):
        if any(rows.data.shape[1] != kind.row_size for rows in shares):
            raise EngineError("slabs of different models cannot be joined")
        np.concatenate([rows.data for rows in shares], out=target.reshape(-1, kind.row_size))
        return
    offset = 0
    for rows in shares:
        end = offset + len(rows.data) * kind.row_size
        convert(np.ascontiguousarray(rows.data).reshape(-1), rows.ggml_type, target[offset:end], kind.ggml_type)
        offset = end
