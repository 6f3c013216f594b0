"""Blocks as bytes: exact round trips, squeezed ones within ggml's own error, and nothing but EngineError for other bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pasture.core.errors import EngineError
from pasture.core.values import Form
from pasture.engine.assembly import assemble
from pasture.engine.blob import BlobFormat, CacheRows, KvSlab, Rows, StateSlab, slab_of
from pasture.engine.blockcodec import LlamaCodec, kinds_in
from pasture.engine.fakecodec import CELL_BYTES, Cell, FakeCodec, FakeSlab
from pasture.engine.kernels import convert

F16, Q8_0, Q4_0 = 1, 8, 2
WIDTHS = (64, 128, 96)
ODD_WIDTH = 48


def f16_slab(p0: int, p1: int, *, n_caches: int = 1, ext_bytes: int = 0, widths: tuple[int, ...] = WIDTHS) -> KvSlab:
    random = np.random.default_rng(p0)

    def rows(width: int) -> Rows:
        return Rows(F16, random.standard_normal((p1 - p0, width)).astype(np.float16).view(np.uint8))

    def cache() -> CacheRows:
        ext = random.integers(0, 256, (p1 - p0, ext_bytes), dtype=np.uint8)
        positions = np.arange(p0, p1, dtype=np.int32)
        return CacheRows(positions, ext, tuple(map(rows, widths)), tuple(map(rows, widths)))

    return KvSlab(p0, p1, tuple(cache() for _ in range(n_caches)))


def codec_of(slab: KvSlab, live: Form = Form.RAW) -> LlamaCodec:
    return LlamaCodec(b"test", slab.kinds, lambda: kinds_in(slab.kinds, live), refuse_state)


def refuse_state(slab: StateSlab) -> None:
    raise EngineError("damaged")


def values(slab: KvSlab) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float16]]]:
    assert all(rows.ggml_type == F16 for cache in slab.caches for rows in cache.tensors)
    return [rows.data.view(np.float16) for cache in slab.caches for rows in cache.tensors]


def same(left: KvSlab, right: KvSlab) -> bool:
    return np.array_equal(assemble([left], n_streams=1), assemble([right], n_streams=1))


@given(st.integers(0, 200), st.integers(1, 64), st.integers(1, 3), st.sampled_from([0, 12]))
def test_raw_is_exact(p0: int, n_cells: int, n_caches: int, ext_bytes: int) -> None:
    slab = f16_slab(p0, p0 + n_cells, n_caches=n_caches, ext_bytes=ext_bytes)
    codec = codec_of(slab)
    payload = codec.pack(slab)
    assert slab.n_bytes < payload.nbytes <= slab.n_bytes + n_cells * ext_bytes * n_caches + 20 + 8 * 6 * n_caches
    back = codec.unpack(payload, p0, p0 + n_cells)
    assert isinstance(back, KvSlab)
    assert same(back, slab)


def test_a_cut_and_a_blob_in_cell_order_pack_the_same_rows() -> None:
    slab = f16_slab(0, 20)
    codec = codec_of(slab)
    again = slab_of(assemble([slab], n_streams=3), BlobFormat(), 0, 20)
    assert np.array_equal(codec.pack(again.cut(5, 9)), codec.pack(slab.cut(5, 9)))


@pytest.mark.parametrize(("form", "ratio", "error"), [(Form.Q8_0, 34 / 64, 0.02), (Form.Q4_0, 18 / 64, 0.6)])
def test_squeezed_is_smaller_and_near(form: Form, ratio: float, error: float) -> None:
    slab = f16_slab(64, 128, ext_bytes=12)
    codec = codec_of(slab)
    payload = codec.squeeze(codec.pack(slab), form)
    assert payload.nbytes == pytest.approx(slab.n_bytes * ratio + 64 * 12, abs=80)
    back = codec.unpack(payload, 64, 128)
    assert isinstance(back, KvSlab)
    for before, after in zip(values(slab), values(back), strict=True):
        assert float(np.abs(before - after).max()) < error
    assert codec.squeeze(payload, form) is payload
    assert codec.squeeze(payload, Form.RAW) is payload
    assert np.array_equal(back.caches[0].ext, slab.caches[0].ext)


def test_further_down_but_never_up() -> None:
    slab = f16_slab(0, 64)
    codec = codec_of(slab)
    once = codec.squeeze(codec.pack(slab), Form.Q8_0)
    twice = codec.squeeze(once, Form.Q4_0)
    assert twice.nbytes < once.nbytes
    assert codec.squeeze(twice, Form.Q8_0) is twice


def test_rows_without_whole_blocks_stay_as_they_are() -> None:
    slab = f16_slab(0, 8, widths=(64, ODD_WIDTH))
    codec = codec_of(slab)
    back = codec.unpack(codec.squeeze(codec.pack(slab), Form.Q4_0), 0, 8)
    assert isinstance(back, KvSlab)
    even, odd = back.caches[0].keys
    assert np.array_equal(odd.data, slab.caches[0].keys[1].data)
    assert not np.array_equal(even.data, slab.caches[0].keys[0].data)
    odd_only = f16_slab(0, 8, widths=(ODD_WIDTH,))
    payload = codec_of(odd_only).pack(odd_only)
    assert codec_of(odd_only).squeeze(payload, Form.Q8_0) is payload


@pytest.mark.parametrize("stored", [Form.RAW, Form.Q8_0, Form.Q4_0])
@pytest.mark.parametrize("live", [Form.RAW, Form.Q8_0])
def test_whatever_is_stored_comes_back_as_the_cache_is_now(stored: Form, live: Form) -> None:
    slab = f16_slab(0, 64)
    codec = codec_of(slab, live)
    payload = codec.squeeze(codec.pack(slab), stored)
    back = codec.unpack(payload, 0, 64)
    assert isinstance(back, KvSlab)
    assert back.kinds == kinds_in(slab.kinds, live)
    direct = codec_of(slab).unpack(payload, 0, 64)
    assert isinstance(direct, KvSlab)
    again = slab_of(assemble([back], n_streams=1, kinds=slab.kinds), BlobFormat(), 0, 64)
    for one, other in zip(values(direct), values(again), strict=True):
        assert float(np.abs(one - other).max()) < 0.02


def test_a_large_channel_does_not_coarsen_its_neighbours() -> None:
    """Keys have them. Rotated before q4_0, and rotated back, the error is that of 64 even values."""
    random = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float16)
    random[:, 5] *= 30
    data = random.view(np.uint8)
    slab = KvSlab(0, 64, (CacheRows(np.arange(64, dtype=np.int32), np.empty((64, 0), np.uint8), (Rows(F16, data),), ()),))
    codec = codec_of(slab)
    back = codec.unpack(codec.squeeze(codec.pack(slab), Form.Q4_0), 0, 64)
    assert isinstance(back, KvSlab)
    (after,) = values(back)
    plain, flat = np.empty(64 * 128 // 32 * 18, np.uint8), np.empty(64 * 128 * 2, np.uint8)
    convert(data.reshape(-1), F16, plain, Q4_0)
    convert(plain, Q4_0, flat, F16)
    unrotated = flat.view(np.float16).reshape(64, 128)
    error, plain_error = (float(np.square((x - random)[:, :32].astype(np.float64)).mean()) for x in (after, unrotated))
    assert error < plain_error / 2


def test_large_runs_are_split_over_threads_and_come_out_equal() -> None:
    wide = f16_slab(0, 600, widths=(4096,))
    codec = codec_of(wide)
    whole = codec.unpack(codec.squeeze(codec.pack(wide), Form.Q8_0), 0, 600)
    assert isinstance(whole, KvSlab)
    for p0 in range(0, 600, 50):
        part = codec.unpack(codec.squeeze(codec.pack(wide.cut(p0, p0 + 50)), Form.Q8_0), p0, p0 + 50)
        assert isinstance(part, KvSlab)
        assert same(part, whole.cut(p0, p0 + 50))


def test_another_place_or_another_model_is_refused() -> None:
    slab = f16_slab(64, 100)
    codec = codec_of(slab)
    payload = codec.pack(slab)
    for p0, p1 in ((0, 36), (64, 101), (64, 99), (65, 100), (64, 64)):
        with pytest.raises(EngineError):
            codec.unpack(payload, p0, p1)
    for other in (f16_slab(64, 100, widths=(64, 128)), f16_slab(64, 100, n_caches=2), f16_slab(64, 100, widths=(64, 96, 128))):
        with pytest.raises(EngineError):
            codec_of(other).unpack(payload, 64, 100)
        with pytest.raises(EngineError):
            codec_of(other).squeeze(payload, Form.Q8_0)
    with pytest.raises(EngineError):
        codec.pack(FakeSlab(0, ()))


def test_a_running_state_is_a_header_and_its_blob() -> None:
    seen: list[StateSlab] = []
    codec = LlamaCodec(b"test", (), lambda: (), seen.append)
    slab = StateSlab(0, 9, np.arange(100, dtype=np.uint8), 3)
    payload = codec.pack(slab)
    assert codec.squeeze(payload, Form.Q4_0) is payload
    back = codec.unpack(payload, 0, 9)
    assert seen == [back]
    assert isinstance(back, StateSlab)
    assert (back.p1, back.n_streams, back.blob.tolist()) == (9, 3, slab.blob.tolist())
    with pytest.raises(EngineError):
        codec.unpack(payload, 0, 8)
    with pytest.raises(EngineError, match="damaged"):
        LlamaCodec(b"test", (), lambda: (), refuse_state).unpack(payload, 0, 9)
    rows = f16_slab(0, 9)
    with pytest.raises(EngineError):
        codec_of(rows).unpack(payload, 0, 9)
    with pytest.raises(EngineError):
        codec.unpack(codec_of(rows).pack(rows), 0, 9)


@given(
    st.integers(0, 1000), st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=64), st.sampled_from(list(CELL_BYTES))
)
def test_the_fake_codec_loses_nothing(p0: int, marks: list[int], form: Form) -> None:
    codec = FakeCodec()
    slab = FakeSlab(p0, tuple(Cell(mark % 512, p0 + i, mark) for i, mark in enumerate(marks)))
    payload = codec.squeeze(codec.pack(slab), form)
    assert payload.nbytes == 16 + CELL_BYTES[form] * len(marks)
    assert codec.unpack(payload, slab.p0, slab.p1).cells == slab.cells
    for wrong in ((p0 + 1, slab.p1 + 1), (p0, slab.p1 + 1)):
        with pytest.raises(EngineError):
            codec.unpack(payload, *wrong)
    with pytest.raises(EngineError):
        codec.unpack(payload[:-1], slab.p0, slab.p1)
