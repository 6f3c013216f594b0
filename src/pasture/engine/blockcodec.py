"""Slabs as flat bytes and back, for the stores: implements `pasture.core.storage.SlabCodec` for llama.cpp.

    header | kind * n_tensors | ext * n_caches | rows * n_tensors          one after the other, nothing between, nothing behind
    header:  4s magic | u8 what (rows, state) | u8 n_caches | u16 n_tensors | u32 p0 | u32 p1 | u32 n_streams
    kind:    i32 ggml type | u32 row size                                  caches in order, K of every layer, then V

Tensors lie next to each other, so that a payload of one type is squeezed, or brought back, in one run. A running state is the
header and the library's own blob. The payload names its types, but the model says which it may have: as computed, as the live
cache is now, or one of the squeezed forms. Whatever else is in it, a wrong size or a wrong position, is an EngineError, since
the library may abort the process on what it does not expect. Stateless but for the live cache's types, which `unpack` reads.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pasture.core.errors import EngineError
from pasture.core.storage import Bytes
from pasture.core.values import Form, Slab
from pasture.engine.blob import CacheKind, CacheRows, KvSlab, RowKind, Rows, StateSlab
from pasture.engine.kernels import Q4_0, Q8_0, ROTATED_Q4_0, can_convert, convert, kernel

_MAGIC = b"pKV1"
_HEADER = struct.Struct("<4sBBHIII")
_KIND = struct.Struct("<iI")
_ROWS, _STATE = 0, 1


def squeezed(kind: RowKind, form: Form) -> RowKind:
    """A row as it was computed, in a form; as it is where it has no whole blocks of it, or would not get smaller."""
    source = kernel(kind.ggml_type)
    elements = source.elements(kind.row_size) if source is not None else None
    if source is None or elements is None:
        return kind
    for ggml_type in _types_of(form, is_plain=source.block_elements == 1):
        target = kernel(ggml_type)
        row_bytes = target.row_bytes(elements) if target is not None and can_convert(kind.ggml_type, ggml_type) else None
        if row_bytes is not None and row_bytes < kind.row_size:
            return RowKind(ggml_type, row_bytes)
    return kind


def _types_of(form: Form, *, is_plain: bool) -> tuple[int, ...]:
    """Best first. The library has rotated quantised rows itself, and rotating them again would undo it."""
    match form:
        case Form.Q8_0:
            return (Q8_0,)
        case Form.Q4_0:
            return (ROTATED_Q4_0, Q4_0) if is_plain else (Q4_0,)
        case _:
            return ()


def kinds_in(kinds: Sequence[CacheKind], form: Form) -> tuple[CacheKind, ...]:
    """What caches of these kinds, as they were computed, become in a form."""
    return tuple(
        CacheKind(
            kind.ext_bytes,
            tuple(squeezed(row, form) for row in kind.keys),
            tuple(squeezed(row, form) for row in kind.values),
        )
        for kind in kinds
    )


@dataclass(frozen=True, slots=True)
class _Head:
    what: int
    n_caches: int
    n_tensors: int
    p0: int
    p1: int
    n_streams: int

    @classmethod
    def of(cls, payload: Bytes) -> _Head:
        if payload.dtype != np.uint8 or payload.ndim != 1 or payload.nbytes < _HEADER.size:
            raise EngineError(f"a payload of {payload.nbytes} bytes is no block")
        magic, *numbers = _HEADER.unpack_from(payload.data)
        if magic != _MAGIC:
            raise EngineError(f"a block begins with {magic!r} instead of {_MAGIC!r}")
        return cls(*numbers)

    def write(self, payload: Bytes) -> None:
        _HEADER.pack_into(payload.data, 0, _MAGIC, self.what, self.n_caches, self.n_tensors, self.p0, self.p1, self.n_streams)


class LlamaCodec:
    """Implements SlabCodec for one model. `pack` and `squeeze` may be called by any thread, `unpack` by the engine's."""

    def __init__(
        self,
        fingerprint: bytes,
        kinds: Sequence[CacheKind],
        live: Callable[[], Sequence[CacheKind]],
        check_state: Callable[[StateSlab], None],
    ) -> None:
        """`kinds`: the caches as configured, none for a model whose states are kept whole. `live`: as they are now.

        `check_state` raises EngineError for a state that is not one of this model.
        """
        self._fingerprint = fingerprint
        self._kinds = tuple(kinds)
        self._live = live
        self._check_state = check_state
        self._in_form = {form: _flat(kinds_in(self._kinds, form)) for form in Form}
        self._known = tuple(frozenset(rows) for rows in zip(*self._in_form.values(), strict=True))
        """by tensor: the kinds a payload may hold it in"""

    @property
    def fingerprint(self) -> bytes:
        return self._fingerprint

    def pack(self, slab: Slab) -> Bytes:
        """The slab in one new buffer. Raises EngineError for a slab of another kind of engine."""
        if isinstance(slab, StateSlab):
            payload = np.empty(_HEADER.size + slab.blob.nbytes, np.uint8)
            _Head(_STATE, 0, 0, slab.p0, slab.p1, slab.n_streams).write(payload)
            payload[_HEADER.size :] = slab.blob
            return payload
        if not isinstance(slab, KvSlab):
            raise EngineError(f"{type(slab).__name__} is no slab of this engine")
        parts = [cache.ext.reshape(-1) for cache in slab.caches]
        parts += [rows.data.reshape(-1) for cache in slab.caches for rows in cache.tensors]
        kinds = _flat(slab.kinds)
        payload = np.empty(_HEADER.size + _KIND.size * len(kinds) + sum(part.nbytes for part in parts), np.uint8)
        _Head(_ROWS, len(slab.caches), len(kinds), slab.p0, slab.p1, 0).write(payload)
        np.concatenate(parts, out=payload[_write_kinds(payload, kinds) :])
        return payload

    def unpack(self, payload: Bytes, p0: int, p1: int) -> Slab:
        """A slab in the live cache's types; views of the payload where it has them already."""
        head = _Head.of(payload)
        if (head.p0, head.p1) != (p0, p1) or not 0 <= p0 < p1:
            raise EngineError(f"a block of [{head.p0}, {head.p1}) is not one of [{p0}, {p1})")
        if not self._kinds:
            return self._unpack_state(payload, head)
        kinds, data = self._read(payload, head)
        live = self._live()
        wanted = _flat(live)
        ext_bytes = [kind.ext_bytes * (p1 - p0) for kind in live]
        rows = _convert_all(data[sum(ext_bytes) :], kinds, wanted, p1 - p0)
        positions: NDArray[np.int32] = np.arange(p0, p1, dtype=np.int32)
        caches, at, tensors = [], 0, iter(_split(rows, wanted, p1 - p0))
        for kind, size in zip(live, ext_bytes, strict=True):
            ext = data[at : at + size].reshape(p1 - p0, kind.ext_bytes)
            at += size
            keys = tuple(next(tensors) for _ in kind.keys)
            caches.append(CacheRows(positions, ext, keys, tuple(next(tensors) for _ in kind.values)))
        return KvSlab(p0, p1, tuple(caches))

    def squeeze(self, payload: Bytes, form: Form) -> Bytes:
        """Every tensor in `form` that gets smaller by it; running states stay as they are. Raises EngineError on damage."""
        head = _Head.of(payload)
        if head.what == _STATE:
            return payload
        kinds, data = self._read(payload, head)
        wanted = [
            smaller if smaller.row_size < kind.row_size else kind
            for kind, smaller in zip(kinds, self._in_form[form], strict=True)
        ]
        if wanted == kinds:
            return payload
        n_cells = head.p1 - head.p0
        n_ext = n_cells * sum(kind.ext_bytes for kind in self._kinds)
        smaller = np.empty(
            _HEADER.size + _KIND.size * len(kinds) + n_ext + n_cells * sum(kind.row_size for kind in wanted), np.uint8
        )
        head.write(smaller)
        offset = _write_kinds(smaller, wanted)
        smaller[offset : offset + n_ext] = data[:n_ext]
        _convert_into(data[n_ext:], kinds, smaller[offset + n_ext :], wanted, n_cells)
        return smaller

    def _unpack_state(self, payload: Bytes, head: _Head) -> StateSlab:
        if head.what != _STATE or head.n_caches or head.n_tensors or head.p0 or not 1 <= head.n_streams <= 256:
            raise EngineError("this model keeps whole states, and the payload is none")
        slab = StateSlab(0, head.p1, payload[_HEADER.size :], head.n_streams)
        self._check_state(slab)
        return slab

    def _read(self, payload: Bytes, head: _Head) -> tuple[list[RowKind], Bytes]:
        """The tensors' kinds, and ext and rows as one run. Raises EngineError unless everything is as this model has it."""
        if (head.what, head.n_caches, head.n_tensors) != (_ROWS, len(self._kinds), len(self._known)) or head.n_streams:
            raise EngineError("a block of another model, or of another kind of model")
        if head.p1 <= head.p0:
            raise EngineError(f"no block covers [{head.p0}, {head.p1})")
        begin = _HEADER.size + _KIND.size * head.n_tensors
        if payload.nbytes < begin:
            raise EngineError(f"a block of {payload.nbytes} bytes ends before its rows begin")
        kinds = [RowKind(*kind) for kind in _KIND.iter_unpack(payload[_HEADER.size : begin].tobytes())]
        for kind, known in zip(kinds, self._known, strict=True):
            if kind not in known:
                raise EngineError(f"rows of type {kind.ggml_type} and {kind.row_size} bytes are not this model's")
        cell_bytes = sum(kind.row_size for kind in kinds) + sum(kind.ext_bytes for kind in self._kinds)
        data = payload[begin:]
        if data.nbytes != cell_bytes * (head.p1 - head.p0):
            raise EngineError(f"{data.nbytes} bytes are not {head.p1 - head.p0} cells of {cell_bytes}")
        return kinds, data


def _flat(kinds: Sequence[CacheKind]) -> list[RowKind]:
    return [row for kind in kinds for row in kind.rows]


def _write_kinds(payload: Bytes, kinds: Sequence[RowKind]) -> int:
    offset = _HEADER.size
    for kind in kinds:
        _KIND.pack_into(payload.data, offset, *kind)
        offset += _KIND.size
    return offset


def _split(data: Bytes, kinds: Sequence[RowKind], n_cells: int) -> list[Rows]:
    rows, offset = [], 0
    for kind in kinds:
        end = offset + kind.row_size * n_cells
        rows.append(Rows(kind.ggml_type, data[offset:end].reshape(n_cells, kind.row_size)))
        offset = end
    return rows


def _convert_all(data: Bytes, kinds: Sequence[RowKind], wanted: Sequence[RowKind], n_cells: int) -> Bytes:
    """Neighbouring tensors' rows in `wanted`: `data` itself where they are."""
    if list(kinds) == list(wanted):
        return data
    target = np.empty(n_cells * sum(kind.row_size for kind in wanted), np.uint8)
    _convert_into(data, kinds, target, wanted, n_cells)
    return target


def _convert_into(data: Bytes, kinds: Sequence[RowKind], target: Bytes, wanted: Sequence[RowKind], n_cells: int) -> None:
    """Runs of tensors that go the same way are converted together."""
    ways = [(kind.ggml_type, to.ggml_type) for kind, to in zip(kinds, wanted, strict=True)]
    here, there, first = 0, 0, 0
    for last in range(1, len(ways) + 1):
        if last < len(ways) and ways[last] == ways[first]:
            continue
        here_end = here + n_cells * sum(kind.row_size for kind in kinds[first:last])
        there_end = there + n_cells * sum(kind.row_size for kind in wanted[first:last])
        convert(data[here:here_end], ways[first][0], target[there:there_end], ways[first][1])
        here, there, first = here_end, there_end, last
