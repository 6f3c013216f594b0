"""The state-blob codec: round trips, cuts, joins, and bytes that are no blob."""

from __future__ import annotations

import contextlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pasture.core.errors import EngineError
from pasture.engine.assembly import assemble, concatenate
from pasture.engine.blob import BlobFormat, CacheRows, KvSlab, Rows, StateSlab, detect_format, parse, slab_of

formats = st.builds(BlobFormat, st.integers(1, 3), st.sampled_from([0, 12]), st.booleans())


def make_slab(p0: int, p1: int, form: BlobFormat, *, seed: int = 0, row_size: int = 6) -> KvSlab:
    random = np.random.default_rng(seed)
    n_cells, n_layers = p1 - p0, 2

    def rows() -> Rows:
        return Rows(1, random.integers(0, 256, (n_cells, row_size), dtype=np.uint8))

    def cache() -> CacheRows:
        return CacheRows(
            np.arange(p0, p1, dtype=np.int32),
            random.integers(0, 256, (n_cells, form.ext_bytes), dtype=np.uint8),
            tuple(rows() for _ in range(n_layers)),
            tuple(rows() for _ in range(n_layers if form.has_values else 0)),
        )

    return KvSlab(p0, p1, tuple(cache() for _ in range(form.n_caches)))


def same(left: KvSlab, right: KvSlab) -> bool:
    return (left.p0, left.p1) == (right.p0, right.p1) and all(
        np.array_equal(a.positions, b.positions)
        and np.array_equal(a.ext, b.ext)
        and all(np.array_equal(x.data, y.data) for x, y in zip(a.tensors, b.tensors, strict=True))
        for a, b in zip(left.caches, right.caches, strict=True)
    )


@given(formats, st.integers(0, 50), st.integers(1, 20), st.integers(1, 256))
def test_what_was_assembled_parses_back(form: BlobFormat, p0: int, n_cells: int, n_streams: int) -> None:
    slab = make_slab(p0, p0 + n_cells, form)
    blob = assemble([slab], n_streams=n_streams)
    assert same(slab_of(blob, form, p0, p0 + n_cells), slab)


@given(formats, st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(1, 4))
def test_cut_and_joined_again_is_the_same(form: BlobFormat, cuts: list[int], n_streams: int) -> None:
    slab = make_slab(10, 40, form)
    edges = sorted({10, 40, *(10 + cut for cut in cuts)})
    parts = [slab.cut(a, b) for a, b in pairwise(edges)]
    assert same(concatenate(parts), slab)
    assert np.array_equal(assemble(parts, n_streams=n_streams), assemble([slab], n_streams=n_streams))
    assert sum(part.n_bytes for part in parts) == slab.n_bytes


def test_a_cut_shares_the_slabs_memory() -> None:
    slab = make_slab(0, 8, BlobFormat())
    part = slab.cut(2, 5)
    assert np.shares_memory(part.caches[0].keys[0].data, slab.caches[0].keys[0].data)


def test_a_whole_blob_goes_back_as_it_came() -> None:
    blob = assemble([make_slab(0, 8, BlobFormat())], n_streams=1)
    slab = slab_of(blob, BlobFormat(), 0, 8)
    assert assemble([slab], n_streams=1) is blob
    assert assemble([slab], n_streams=2) is not blob
    assert assemble([slab.cut(0, 7)], n_streams=1) is not blob


def test_rows_in_cell_order_come_out_in_position_order() -> None:
    slab = make_slab(0, 6, BlobFormat())
    order = np.array([3, 0, 5, 1, 4, 2])
    cache = slab.caches[0]
    blob = assemble([slab], n_streams=1).copy()
    cells = blob[16 : 16 + 6 * 12].view(BlobFormat().cell_type)
    cells["position"] = order
    for index, tensor in enumerate(cache.tensors):
        start = 16 + 6 * 12 + 8 + index * (12 + 36) + 12
        blob[start : start + 36] = tensor.data[order].reshape(-1)
    assert same(slab_of(blob, BlobFormat(), 0, 6), slab)


@given(st.binary(max_size=200), formats)
def test_random_bytes_raise_and_nothing_worse(raw: bytes, form: BlobFormat) -> None:
    with pytest.raises(EngineError):
        parse(raw, form)


@given(st.data())
def test_a_damaged_header_raises_or_parses_but_never_crashes(data: st.DataObject) -> None:
    blob = assemble([make_slab(0, 4, BlobFormat())], n_streams=1).copy()
    at = data.draw(st.integers(0, len(blob) - 1))
    blob[at] ^= data.draw(st.integers(1, 255))
    length = data.draw(st.integers(0, len(blob)))
    for damaged in (blob, blob[:length]):
        with contextlib.suppress(EngineError):
            slab_of(damaged, BlobFormat(), 0, 4)


def test_a_short_blob_and_a_long_one_are_refused() -> None:
    blob = assemble([make_slab(0, 4, BlobFormat())], n_streams=1)
    with pytest.raises(EngineError, match="are left"):
        parse(blob[:-1], BlobFormat())
    with pytest.raises(EngineError, match="follow its end"):
        parse(np.append(blob, np.uint8(0)), BlobFormat())


def test_transposed_values_are_refused() -> None:
    blob = assemble([make_slab(0, 1, BlobFormat())], n_streams=1).copy()
    blob[16 + 12] = 1
    with pytest.raises(EngineError, match="flash attention"):
        parse(blob, BlobFormat())


def test_slabs_that_do_not_touch_or_match_are_not_joined() -> None:
    first = make_slab(0, 4, BlobFormat())
    with pytest.raises(EngineError, match="do not touch"):
        concatenate([first, make_slab(5, 6, BlobFormat())])
    with pytest.raises(EngineError, match="different models"):
        assemble([first, make_slab(4, 6, BlobFormat(), row_size=7)], n_streams=1)
    with pytest.raises(EngineError, match="different models"):
        assemble([first, make_slab(4, 6, BlobFormat(2))], n_streams=1)


def test_no_part_outside_of_a_slab() -> None:
    with pytest.raises(EngineError, match="not a part"):
        make_slab(4, 8, BlobFormat()).cut(3, 5)


def test_a_slab_must_have_all_its_cells() -> None:
    slab = make_slab(0, 8, BlobFormat(2))
    with pytest.raises(EngineError, match="lacks"):
        KvSlab(0, 8, (slab.caches[0], slab.caches[1].between(2, 8)))


@given(formats, st.integers(1, 3))
def test_the_format_is_found_from_one_blob(form: BlobFormat, n_streams: int) -> None:
    blob = assemble([make_slab(0, 2, form)], n_streams=n_streams)
    assert detect_format(blob, 2) == form


def test_an_unknown_blob_has_no_format() -> None:
    assert detect_format(b"\x00" * 64, 2) is None


def test_a_running_state_is_kept_whole() -> None:
    slab = StateSlab(0, 9, np.zeros(4, np.uint8), 1)
    assert slab.cut(0, 9) is slab
    assert slab.n_bytes == 4
    with pytest.raises(EngineError, match="whole"):
        slab.cut(0, 8)
