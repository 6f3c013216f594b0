"""The fake engine's cells, slabs and codec: the same promises as llama.cpp's, without a model.

A cell takes 64 bytes as it is, 34 in what stands for Q8_0 and 18 for Q4_0, the ratios of f16 to ggml's types. All of them
hold the whole cell, so a squeezed payload restores exactly, and a damaged, foreign or misplaced one changes the text that
follows, or raises EngineError where the real codec would. Any thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from pasture.core.errors import EngineError
from pasture.core.storage import Bytes
from pasture.core.values import Form, Slab

CELL_BYTES: Mapping[Form, int] = MappingProxyType({Form.RAW: 64, Form.Q8_0: 34, Form.Q4_0: 18})
_CELL = np.dtype([("token", "<u4"), ("pos", "<u4"), ("mark", "<u8")])
_HEADER = np.dtype([("magic", "S4"), ("p0", "<u4"), ("n_cells", "<u4"), ("cell_bytes", "<u4")])
_MAGIC = b"fake"

Cells = NDArray[np.void]


@dataclass(frozen=True, slots=True)
class Cell:
    token: int
    pos: int
    mark: int
    """hash of this cell and of all that it attended to"""


class FakeSlab(Slab):
    """Cells of `[p0, p1)`."""

    def __init__(self, p0: int, cells: tuple[Cell, ...]) -> None:
        self.p0 = p0
        self.p1 = p0 + len(cells)
        self.cells = cells

    @property
    def n_bytes(self) -> int:
        return CELL_BYTES[Form.RAW] * len(self.cells)

    def cut(self, p0: int, p1: int) -> FakeSlab:
        assert self.p0 <= p0 <= p1 <= self.p1
        return FakeSlab(p0, self.cells[p0 - self.p0 : p1 - self.p0])


class FakeCodec:
    """Implements SlabCodec. Codecs of equal `fingerprint` may exchange payloads."""

    def __init__(self, fingerprint: bytes = b"the fake engine") -> None:
        self._fingerprint = fingerprint

    @property
    def fingerprint(self) -> bytes:
        return self._fingerprint

    def pack(self, slab: Slab) -> Bytes:
        """Raises EngineError for a slab of another engine."""
        if not isinstance(slab, FakeSlab):
            raise EngineError(f"{type(slab).__name__} is no slab of this engine")
        cells = np.array([(cell.token, cell.pos, cell.mark) for cell in slab.cells], _CELL)
        return _payload(slab.p0, cells, CELL_BYTES[Form.RAW])

    def unpack(self, payload: Bytes, p0: int, p1: int) -> FakeSlab:
        """Raises EngineError on anything that `pack` or `squeeze` did not make of `[p0, p1)`."""
        start, cells, _ = _read(payload)
        if (start, len(cells)) != (p0, p1 - p0) or cells["pos"].tolist() != list(range(p0, p1)):
            raise EngineError(f"the payload is not that of [{p0}, {p1})")
        return FakeSlab(p0, tuple(Cell(token, pos, mark) for token, pos, mark in cells.tolist()))

    def squeeze(self, payload: Bytes, form: Form) -> Bytes:
        """The same cells in fewer bytes; Q8_0 and Q4_0 only."""
        p0, cells, cell_bytes = _read(payload)
        wanted = CELL_BYTES.get(form, cell_bytes)
        return payload if wanted >= cell_bytes else _payload(p0, cells, wanted)


def _payload(p0: int, cells: Cells, cell_bytes: int) -> Bytes:
    payload = np.zeros(_HEADER.itemsize + len(cells) * cell_bytes, np.uint8)
    payload[: _HEADER.itemsize] = np.array([(_MAGIC, p0, len(cells), cell_bytes)], _HEADER).view(np.uint8)
    rows = payload[_HEADER.itemsize :].reshape(len(cells), cell_bytes)
    rows[:, : _CELL.itemsize] = cells.view(np.uint8).reshape(len(cells), _CELL.itemsize)
    return payload


def _read(payload: Bytes) -> tuple[int, Cells, int]:
    """First position, cells, bytes a cell."""
    if payload.nbytes < _HEADER.itemsize:
        raise EngineError(f"a payload of {payload.nbytes} bytes is no block")
    magic, p0, n_cells, cell_bytes = payload[: _HEADER.itemsize].view(_HEADER)[0].tolist()
    rows = payload[_HEADER.itemsize :]
    if magic != _MAGIC or cell_bytes not in CELL_BYTES.values() or rows.nbytes != n_cells * cell_bytes:
        raise EngineError("the payload is none of the fake engine's")
    cells = np.ascontiguousarray(rows.reshape(n_cells, cell_bytes)[:, : _CELL.itemsize])
    return p0, cells.view(_CELL).reshape(n_cells), cell_bytes
