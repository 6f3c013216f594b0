"""Slabs, a codec and shorthands for tests of the tiers. No model; the slabs are the fake engine's."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from pasture.core.errors import EngineError
from pasture.core.storage import BlockKey, Bytes, TierStatistics
from pasture.core.values import Form, Namespace, Slab
from pasture.engine.fake import Cell, FakeSlab
from pasture.tiers.block import Block
from pasture.tiers.gate import Gate, OpenGate
from pasture.tiers.keys import Address
from pasture.tiers.memory import MemoryTier
from pasture.tiers.ports import SlowTier
from pasture.tiers.store import TieredStore

NAME = Namespace("tests")
_ROWS = {
    Form.RAW: np.dtype([("token", "<i8"), ("pos", "<i8"), ("mark", "<u8")]),
    Form.Q8_0: np.dtype([("token", "<u4"), ("mark", "<u8")]),
    Form.Q4_0: np.dtype([("token", "<u2"), ("mark", "<u8")]),
}
"""24, 12 and 10 bytes a token, and nothing lost: what comes back can be compared"""
_LETTERS = {Form.RAW: b"r", Form.Q8_0: b"8", Form.Q4_0: b"4"}


class PlainCodec:
    """Cells as records, behind a letter that tells the form."""

    def __init__(self, fingerprint: bytes = b"plain", *, pad_bytes: int = 0) -> None:
        self.fingerprint = fingerprint
        self.n_packed = 0
        self._pad = b"." * pad_bytes

    def pack(self, slab: Slab) -> Bytes:
        assert isinstance(slab, FakeSlab)
        self.n_packed += 1
        rows = np.array([(cell.token, cell.pos, cell.mark) for cell in slab.cells], _ROWS[Form.RAW])
        return np.frombuffer(b"r" + rows.tobytes() + self._pad, np.uint8)

    def unpack(self, payload: Bytes, p0: int, p1: int) -> FakeSlab:
        data = payload.tobytes()
        form = next((form for form, letter in _LETTERS.items() if letter == data[:1]), None)
        body = data[1 : len(data) - len(self._pad)]
        if form is None or len(body) != (p1 - p0) * _ROWS[form].itemsize:
            raise EngineError(f"{len(data)} bytes are not [{p0}, {p1})")
        rows = np.frombuffer(body, _ROWS[form])
        return FakeSlab(p0, tuple(Cell(int(r["token"]), p0 + i, int(r["mark"])) for i, r in enumerate(rows)))

    def squeeze(self, payload: Bytes, form: Form) -> Bytes:
        data = payload.tobytes()
        before = next(form for form, letter in _LETTERS.items() if letter == data[:1])
        if _ROWS[form].itemsize >= _ROWS[before].itemsize:
            return payload
        rows = np.frombuffer(data[1 : len(data) - len(self._pad)], _ROWS[before])
        narrow = np.empty(len(rows), _ROWS[form])
        narrow["token"], narrow["mark"] = rows["token"], rows["mark"]
        return np.frombuffer(_LETTERS[form] + narrow.tobytes() + self._pad, np.uint8)


def toks(values: Iterable[int]) -> array[int]:
    return array("i", values)


def mark(prefix: Iterable[int]) -> int:
    """What a cell behind these tokens carries: it depends on all of them, as a real key does."""
    return hash(tuple(prefix)) & ((1 << 64) - 1)


def slab_of(tokens: array[int], p0: int, p1: int) -> FakeSlab:
    """The one right slab for `tokens[p0:p1]`."""
    return FakeSlab(p0, tuple(Cell(tokens[p], p, mark(tokens[: p + 1])) for p in range(p0, p1)))


def cells_of(slabs: Iterable[Slab]) -> list[Cell]:
    cells: list[Cell] = []
    for slab in slabs:
        assert isinstance(slab, FakeSlab)
        cells += slab.cells
    return cells


OPENED: list[TieredStore] = []
"""closed after each test by the fixture in tests/unit/tiers/conftest.py"""


def make_store(memory: MemoryTier, slow: Sequence[SlowTier] = (), gate: Gate | None = None) -> TieredStore:
    store = TieredStore(PlainCodec(), memory, gate or OpenGate(), slow=slow)
    OPENED.append(store)
    return store


def ram_store(
    budget_bytes: int = 1 << 30, *, divisible: bool = True, gate: Gate | None = None, codec: PlainCodec | None = None
) -> tuple[TieredStore, MemoryTier]:
    """A store without a slow tier, and its RAM."""
    memory = MemoryTier(budget_bytes, divisible=divisible)
    store = TieredStore(codec or PlainCodec(), memory, gate or OpenGate())
    OPENED.append(store)
    return store, memory


class ShelfTier:
    """A slow tier in a dictionary, whose calls can be held up (`gate.clear()`) or made to fail."""

    def __init__(self, name: str = "shelf", *, batch_bytes: int = 0) -> None:
        self.name = name
        self.batch_bytes = batch_bytes
        self.accepts = True
        self.blocks: dict[BlockKey, Block] = {}
        self.log: list[tuple[str, BlockKey]] = []
        self.batches: list[int] = []
        self.open = threading.Event()
        self.open.set()
        self.failing = False
        self.closed = False

    def _enter(self, call: str, key: BlockKey) -> None:
        self.log.append((call, key))
        self.open.wait(60)
        if self.failing:
            raise OSError(f"{self.name} fails")

    def stored(self, path: Sequence[Address], before: Sequence[Address] = (), *, use: bool = True) -> list[bool]:
        self._enter("stored", path[0].key)
        return [address.key in self.blocks for address in path]

    def following(self, parents: Sequence[BlockKey]) -> list[list[tuple[Address, array[int]]]]:
        self._enter("following", parents[0])
        found = [[block for block in self.blocks.values() if block.address.parent == parent] for parent in parents]
        return [[(b.address, b.tokens) for b in reversed(children)] for children in found]

    def get_batch(self, addresses: Sequence[Address], timeout_seconds: float) -> list[Block | None]:
        for address in addresses:
            self._enter("get", address.key)
        self.batches.append(len(addresses))
        return [self.blocks.get(address.key) for address in addresses]

    def put(self, block: Block) -> bool:
        self._enter("put", block.address.key)
        self.blocks.setdefault(block.address.key, block)
        return True

    def remove(self, key: BlockKey) -> None:
        self._enter("remove", key)
        self.blocks.pop(key, None)

    def calls(self, name: str) -> int:
        return sum(call == name for call, _ in self.log)

    def statistics(self) -> TierStatistics:
        size = sum(block.n_bytes for block in self.blocks.values())
        return TierStatistics(self.name, len(self.blocks), size, 1 << 40, 0, 0, {}, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0)

    def close(self) -> None:
        self.closed = True


def put(store: TieredStore, tokens: array[int], p0: int = 0, name: Namespace = NAME) -> None:
    """Store what is missing of `tokens[p0:]`, as the scheduler does."""
    start = store.gap(name, tokens, p0)
    if start < len(tokens):
        store.put(name, tokens, slab_of(tokens, start, len(tokens)))
