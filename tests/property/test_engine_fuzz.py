"""Hostile bytes for the block codec and the blob parsers: an EngineError or a slab, nothing else, and no large allocation.

Mutations of good payloads (bits, runs, numbers that mean sizes, cuts, splices) and random bytes. PASTURE_FUZZ_INPUTS sets the
number of inputs; a million take some minutes.
"""

from __future__ import annotations

import os
import random
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from pasture.core.errors import EngineError
from pasture.core.storage import Bytes
from pasture.core.values import Form
from pasture.engine.assembly import assemble
from pasture.engine.blob import BlobFormat, CacheRows, KvSlab, Rows, StateSlab, parse, slab_of
from pasture.engine.blockcodec import LlamaCodec, kinds_in
from pasture.engine.fakecodec import Cell, FakeCodec, FakeSlab
from pasture.engine.stateblob import StateFormat, detect_state_format
from tests.engine_support import Hand, open_small
from tests.gguf_factory import write_falcon_h1

N_INPUTS = int(os.environ.get("PASTURE_FUZZ_INPUTS", "20000"))
SIZES = (0, 1, 2, 7, 8, 31, 32, 255, 256, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1)
ALLOWED_GROWTH = 16
"""q4_0 becomes f16 in 3.6 times the bytes; positions and views are the rest"""
SPARE_BYTES = 1 << 16

Target = Callable[[Bytes], object]


def mutate(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(raw)) if raw else 0
        if rng.random() < 0.6:
            at = min(at, rng.randrange(120))
        match rng.randrange(7):
            case 0 if raw:
                raw[at] ^= 1 << rng.randrange(8)
            case 1 if raw:
                raw[at] = rng.randrange(256)
            case 2:
                width = rng.choice((1, 2, 4, 8))
                raw[at : at + width] = (rng.choice(SIZES) & ((1 << 8 * width) - 1)).to_bytes(width, "little")
            case 3:
                del raw[rng.randrange(len(raw) + 1) :]
            case 4:
                del raw[at : at + rng.randrange(1, 64)]
            case 5:
                raw[at:at] = rng.randbytes(rng.randrange(1, 64))
            case _:
                raw[at:] = rng.choice(others)[at:]
    return bytes(raw)


def hammer(target: Target, good: list[bytes], n_inputs: int, seed: int) -> int:
    """How many inputs were taken for good. Fails on any other exception, and on allocations that the input does not explain."""
    rng = random.Random(seed)
    accepted = 0
    tracemalloc.start()
    try:
        for _ in range(n_inputs):
            fresh = rng.random() < 0.1
            data = rng.randbytes(rng.randrange(200)) if fresh else mutate(rng.choice(good), good, rng)
            payload = np.frombuffer(data, np.uint8)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                target(payload)
                accepted += 1
            except EngineError:
                pass
            assert tracemalloc.get_traced_memory()[1] - before < ALLOWED_GROWTH * len(data) + SPARE_BYTES
    finally:
        tracemalloc.stop()
    return accepted


def slab_of_floats(n_cells: int, form: BlobFormat) -> KvSlab:
    rng = np.random.default_rng(1)

    def rows() -> tuple[Rows, ...]:
        data = [rng.standard_normal((n_cells, 32)).astype(np.float16).view(np.uint8) for _ in range(2)]
        return tuple(Rows(1, rows) for rows in data)

    def cache() -> CacheRows:
        ext = rng.integers(0, 256, (n_cells, form.ext_bytes), dtype=np.uint8)
        return CacheRows(np.arange(n_cells, dtype=np.int32), ext, rows(), rows())

    return KvSlab(0, n_cells, tuple(cache() for _ in range(form.n_caches)))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("live", [Form.RAW, Form.Q8_0])
def test_the_codec(live: Form) -> None:
    slab = slab_of_floats(4, BlobFormat(2, 12))
    codec = LlamaCodec(b"", slab.kinds, lambda: kinds_in(slab.kinds, live), lambda _: None)
    raw = codec.pack(slab)
    good = [codec.squeeze(raw, form).tobytes() for form in (Form.RAW, Form.Q8_0, Form.Q4_0)]

    def both(payload: Bytes) -> None:
        for form in (Form.Q8_0, Form.Q4_0):
            codec.squeeze(payload, form)
        codec.unpack(payload, 0, 4)

    assert 0 < hammer(both, good, N_INPUTS // 4, seed=1) < N_INPUTS // 4


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("form", [BlobFormat(), BlobFormat(2, 12)])
def test_the_blob_parser(form: BlobFormat) -> None:
    slab = slab_of_floats(4, form)
    good = [assemble([slab], n_streams=n).tobytes() for n in (1, 4)]
    hammer(lambda blob: parse(blob, form), good, N_INPUTS // 8, seed=2)
    hammer(lambda blob: slab_of(blob, form, 0, 4), good, N_INPUTS // 8, seed=3)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> tuple[StateFormat, StateSlab]:
    engine = open_small(write_falcon_h1(tmp_path_factory.mktemp("models") / "hybrid.gguf"))
    hand = Hand(engine)
    hand.feed(0, [5, 6, 7, 8, 9], 0)
    slab = hand.save(0, 0, 5)
    engine.close()
    assert isinstance(slab, StateSlab)
    form = detect_state_format(slab)
    assert form is not None
    return form, slab


@pytest.mark.timeout(1800)
def test_running_states(hybrid: tuple[StateFormat, StateSlab]) -> None:
    form, slab = hybrid
    codec = LlamaCodec(b"", (), lambda: (), form.check)
    good = [codec.pack(slab).tobytes()]
    hammer(lambda payload: codec.unpack(payload, 0, 5), good, N_INPUTS // 8, seed=4)
    hammer(lambda blob: detect_state_format(StateSlab(0, 5, blob, 1)), [slab.blob.tobytes()], N_INPUTS // 80, seed=5)


@pytest.mark.timeout(1800)
def test_the_fake_codec() -> None:
    codec = FakeCodec()
    raw = codec.pack(FakeSlab(0, tuple(Cell(i, i, i) for i in range(4))))
    good = [codec.squeeze(raw, form).tobytes() for form in Form]
    hammer(lambda payload: codec.unpack(payload, 0, 4), good, N_INPUTS // 8, seed=6)
