"""What is inside the state blob of a model whose sequences are kept whole: read only to tell whether it is intact.

    u32 magic | i32 seq_id | attention cache * n_caches | [running state]
    attention cache:  as in `pasture.engine.blob`; without flash attention V is transposed:
                      (i32 type | u32 element_size | u32 n_embd | n_embd * n_cells elements) * n_layer
    running state:    u32 n_cells | (i32 position | u32 0) * n_cells | u32 0 | u32 n_layer |
                      (i32 type | u64 row_size | rows) * ...

How many tensors a running state has depends on the model's layers, so the shape of a model's blobs is learnt from one, and
every other must have the same. Pure functions; any thread. Source: src/llama-memory-recurrent.cpp, src/llama-memory-hybrid.cpp.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from pasture.core.errors import EngineError
from pasture.engine.blob import HEADER, LAYERS, MAGIC, MAX_LAYERS, TENSOR, U32, BlobFormat, Cursor, StateSlab

_COLUMNS = struct.Struct("<iII")
"""type, element size, n_embd"""
_RUNNING_CELL = np.dtype([("position", "<i4"), ("n_seq_id", "<u4")])


@dataclass(frozen=True, slots=True)
class StateFormat:
    """The shape of one model's state blobs, found by `detect_state_format`."""

    n_caches: int
    cells: BlobFormat
    is_running: bool
    tensors: tuple[tuple[int, ...], ...] = ()
    """type and sizes of every tensor in order; of the blob it was learnt from"""

    def check(self, slab: StateSlab) -> None:
        """Raises EngineError unless the blob is a whole state of `[0, slab.p1)`."""
        if _tensors_in(slab, self) != self.tensors:
            raise EngineError("the state of another model")


def detect_state_format(slab: StateSlab) -> StateFormat | None:
    """The one format that the blob of a good slab has; None where it is none we know."""
    for is_running in (True, False):
        for n_caches in (0, 1, 2):
            for ext_bytes in (0, 12):
                for has_values in (True, False):
                    form = StateFormat(n_caches, BlobFormat(ext_bytes=ext_bytes, has_values=has_values), is_running)
                    try:
                        tensors = _tensors_in(slab, form)
                    except EngineError:
                        continue
                    if tensors:
                        return StateFormat(n_caches, form.cells, is_running, tensors)
    return None


def _tensors_in(slab: StateSlab, form: StateFormat) -> tuple[tuple[int, ...], ...]:
    cursor = Cursor(slab.blob)
    magic, _seq_id = cursor.unpack(HEADER)
    if magic != MAGIC:
        raise EngineError(f"state blob: it begins with {magic:#010x} instead of {MAGIC:#010x}")
    tensors: list[tuple[int, ...]] = []
    for _ in range(form.n_caches):
        tensors += _read_cache(cursor, slab, form.cells)
    if form.is_running:
        tensors += _read_running(cursor, slab.p1)
    if cursor.left:
        raise EngineError(f"state blob: {cursor.left} bytes follow its end")
    return tuple(tensors)


def _read_cache(cursor: Cursor, slab: StateSlab, form: BlobFormat) -> list[tuple[int, ...]]:
    (n_streams,) = cursor.unpack(U32)
    if n_streams != slab.n_streams:
        raise EngineError(f"state blob: {n_streams} streams instead of {slab.n_streams}")
    filled: list[list[tuple[int, ...]]] = []
    for _ in range(n_streams):
        (n_cells,) = cursor.unpack(U32)
        if n_cells:
            filled.append(_read_stream(cursor, n_cells, slab.p1, form))
    if len(filled) != 1:
        raise EngineError(f"state blob: {len(filled)} streams hold the sequence")
    return filled[0]


def _read_stream(cursor: Cursor, n_cells: int, p1: int, form: BlobFormat) -> list[tuple[int, ...]]:
    cells = cursor.take(n_cells * form.cell_type.itemsize).view(form.cell_type)
    positions = np.sort(cells["position"])
    intact = bool(np.all(cells["n_seq_id"] == 1) and np.all(np.diff(positions) == 1))
    if not intact or int(positions[0]) < 0 or int(positions[-1]) != p1 - 1:
        raise EngineError(f"state blob: its cells are not those before position {p1}")
    transposed, n_layers = cursor.unpack(LAYERS)
    if transposed > 1 or n_layers > MAX_LAYERS:
        raise EngineError(f"state blob: {n_layers} layers, transposed: {transposed}")
    tensors = [_read_rows(cursor, n_cells) for _ in range(n_layers)]
    read = _read_columns if transposed else _read_rows
    return tensors + [read(cursor, n_cells) for _ in range(n_layers if form.has_values else 0)]


def _read_rows(cursor: Cursor, n_cells: int) -> tuple[int, ...]:
    ggml_type, row_size = cursor.unpack(TENSOR)
    cursor.take(n_cells * row_size)
    return ggml_type, row_size


def _read_columns(cursor: Cursor, n_cells: int) -> tuple[int, ...]:
    ggml_type, element_size, n_embd = cursor.unpack(_COLUMNS)
    cursor.take(n_cells * element_size * n_embd)
    return ggml_type, element_size, n_embd


def _read_running(cursor: Cursor, p1: int) -> list[tuple[int, ...]]:
    (n_cells,) = cursor.unpack(U32)
    if n_cells != 1:
        raise EngineError(f"state blob: {n_cells} running states of one sequence")
    (cell,) = cursor.take(_RUNNING_CELL.itemsize).view(_RUNNING_CELL)
    if (int(cell["position"]), int(cell["n_seq_id"])) != (p1 - 1, 0):
        raise EngineError(f"state blob: its running state is not that of position {p1}")
    transposed, n_layers = cursor.unpack(LAYERS)
    if transposed or n_layers > MAX_LAYERS:
        raise EngineError(f"state blob: {n_layers} layers, transposed: {transposed}")
    tensors: list[tuple[int, ...]] = [(n_layers,)]
    while cursor.left:
        tensors.append(_read_rows(cursor, 1))
        if not tensors[-1][1]:
            raise EngineError("state blob: a tensor without a row")
    return tensors
