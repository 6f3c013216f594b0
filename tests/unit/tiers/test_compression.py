"""Which block is squeezed next and into what; the lossless step; and that what comes back is what was put."""

from __future__ import annotations

import logging
import struct

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from pasture.core.errors import EngineError
from pasture.core.storage import Bytes
from pasture.core.values import Form
from pasture.tiers.compression import EVERY_FORM, SQUEEZE_ABOVE, Compression, Squeezer, deflate, inflate, ladder
from pasture.tiers.gate import OpenGate
from pasture.tiers.memory import MemoryTier
from pasture.tiers.store import TieredStore
from tests.tier_support import NAME, OPENED, PlainCodec, ShelfTier, cells_of, put, slab_of, toks

PAD = 2000
SIZE = PAD + 64 * 24 + 1 + 1536
LOSSY = frozenset({Form.RAW, Form.Q8_0, Form.Q4_0})


class NoisyCodec(PlainCodec):
    """Its payloads cannot be compressed, as quantised values cannot."""

    def pack(self, slab: object) -> Bytes:
        self._pad = np.random.default_rng(7).bytes(20_000)
        return super().pack(slab)  # type: ignore[arg-type]


def setup(
    compression: Compression, allowed: frozenset[Form], budget: int, codec: PlainCodec | None = None
) -> tuple[TieredStore, MemoryTier, Squeezer]:
    codec = codec or PlainCodec(pad_bytes=PAD)
    memory = MemoryTier(budget, squeeze_stages=len(ladder(compression, allowed)))
    store = TieredStore(codec, memory, OpenGate())
    OPENED.append(store)
    return store, memory, Squeezer(memory, codec, compression, allowed)


def run(squeezer: Squeezer) -> int:
    n_steps = 0
    while squeezer.step():
        n_steps += 1
    return n_steps


@given(st.binary(max_size=300))
def test_lossless_is_lossless(data: bytes) -> None:
    assert inflate(deflate(np.frombuffer(data, np.uint8))).tobytes() == data


def test_byte_planes_help_half_floats() -> None:
    values = np.random.default_rng(0).standard_normal(500_000).astype(np.float16).view(np.uint8)
    plain = len(zstandard.ZstdCompressor(level=1).compress(values.tobytes()))
    assert deflate(values).nbytes < 0.9 * values.nbytes < plain


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        struct.pack("<Q", 5) + b"no frame",
        struct.pack("<Q", 4) + zstandard.compress(b"12345"),
        struct.pack("<Q", 5) + zstandard.compress(b"12345")[:-2],
        struct.pack("<Q", 1 << 40) + zstandard.compress(bytes(1 << 24)),
        struct.pack("<Q", 1 << 24) + zstandard.compress(bytes(1 << 24)),
    ],
)
def test_what_was_not_made_here_is_refused(data: bytes) -> None:
    with pytest.raises(EngineError):
        inflate(np.frombuffer(data, np.uint8))


def test_auto_squeezes_the_coldest_down_to_the_watermark_and_no_further() -> None:
    size = SIZE - PAD
    store, memory, squeezer = setup(Compression.AUTO, LOSSY, int(10.2 * size), PlainCodec())
    old, new = toks(range(256)), toks(range(1000, 1256))
    put(store, old)
    assert run(squeezer) == 0
    put(store, new)
    store.take(NAME, old, 0, 256)
    assert memory.used_bytes == 8 * size
    put(store, toks(range(5000, 5064)))
    assert run(squeezer) > 0
    assert memory.used_bytes <= SQUEEZE_ABOVE * memory.budget_bytes < memory.used_bytes + size
    blocks = [memory.fetch(store._trails.of(NAME, tokens), 0, 256) for tokens in (old, new)]
    assert [block.form for block in blocks[0]] == [Form.RAW] * 4
    assert [block.form for block in blocks[1]] == [Form.Q8_0] * 4
    assert cells_of(store.take(NAME, new, 0, 256)) == list(slab_of(new, 0, 256).cells)
    memory.check()


def test_under_lasting_pressure_every_allowed_step_is_taken_in_turn() -> None:
    store, memory, squeezer = setup(Compression.AUTO, LOSSY, 100 * SIZE)
    tokens = toks(range(250))
    put(store, tokens)
    memory.resize(memory.used_bytes)
    forms = []
    for _ in range(8):
        memory.resize(memory.used_bytes)
        assert squeezer.step()
        forms.append(sorted(block.form for block in memory.fetch(store._trails.of(NAME, tokens), 0, 250)))
    assert forms[3] == [Form.Q8_0] * 4
    assert forms[7] == [Form.Q4_0] * 4
    memory.resize(memory.used_bytes)
    assert not squeezer.step()
    assert cells_of(store.take(NAME, tokens, 0, 250)) == list(slab_of(tokens, 0, 250).cells)
    assert squeezer.bytes_saved == 250 * 14


@pytest.mark.parametrize("allowed", [frozenset({Form.RAW}), frozenset({Form.RAW, Form.Q8_0})])
def test_no_form_beyond_what_quality_allows(allowed: frozenset[Form]) -> None:
    store, memory, squeezer = setup(Compression.AUTO, allowed, 5 * SIZE)
    put(store, toks(range(256)))
    memory.resize(memory.used_bytes)
    run(squeezer)
    assert memory.statistics().bytes_by_form.keys() <= allowed
    assert ladder(Compression.Q4_0, allowed) == ()


@pytest.mark.parametrize(
    ("compression", "form"),
    [(Compression.Q8_0, Form.Q8_0), (Compression.Q4_0, Form.Q4_0), (Compression.LOSSLESS, Form.LOSSLESS)],
)
def test_a_fixed_form_is_used_for_everything_without_pressure(compression: Compression, form: Form) -> None:
    store, memory, squeezer = setup(compression, EVERY_FORM, 1000 * SIZE)
    tokens = toks(range(250))
    put(store, tokens)
    assert run(squeezer) == 4
    assert memory.statistics().bytes_by_form.keys() == {form}
    assert cells_of(store.take(NAME, tokens, 3, 250)) == list(slab_of(tokens, 3, 250).cells)
    assert cells_of(store.take(NAME, tokens, 70, 71)) == list(slab_of(tokens, 70, 71).cells)


@pytest.mark.parametrize(
    ("compression", "allowed", "form"),
    [
        (Compression.Q8_0, EVERY_FORM, Form.Q8_0),
        (Compression.Q4_0, EVERY_FORM, Form.Q4_0),
        (Compression.LOSSLESS, EVERY_FORM, Form.LOSSLESS),
        (Compression.Q4_0, frozenset({Form.RAW, Form.Q8_0}), Form.RAW),
        (Compression.AUTO, EVERY_FORM, Form.RAW),
        (Compression.OFF, EVERY_FORM, Form.RAW),
    ],
)
def test_a_fixed_form_is_what_slow_tiers_get(compression: Compression, allowed: frozenset[Form], form: Form) -> None:
    codec, near, far = PlainCodec(pad_bytes=PAD), ShelfTier("near"), ShelfTier("far")
    memory = MemoryTier(1000 * SIZE, n_writers=2, squeeze_stages=len(ladder(compression, allowed)))
    squeezer = Squeezer(memory, codec, compression, allowed)
    store = TieredStore(codec, memory, OpenGate(), slow=(near, far), squeezer=squeezer)
    OPENED.append(store)
    store._upkeep.stop(10)  # which squeezes what is in RAM, sooner or later than it is written
    tokens = toks(range(250))
    put(store, tokens)
    assert store.flush(20)
    for tier in (near, far):
        assert [block.form for block in tier.blocks.values()] == [form] * 4
    assert memory.statistics().bytes_by_form.keys() == {form}, "RAM has it too, so that it is made once"
    assert not squeezer.step()
    assert cells_of(store.take(NAME, tokens, 0, 250)) == list(slab_of(tokens, 0, 250).cells)
    memory.check()


def test_a_damaged_block_is_written_as_it_is_and_the_writer_goes_on() -> None:
    class Refusing(PlainCodec):
        def squeeze(self, payload: Bytes, form: Form) -> Bytes:
            raise EngineError("damaged")

    memory, tier = MemoryTier(1000 * SIZE, n_writers=1, squeeze_stages=1), ShelfTier()
    squeezer = Squeezer(memory, Refusing(), Compression.Q8_0, EVERY_FORM)
    store = TieredStore(PlainCodec(), memory, OpenGate(), slow=(tier,), squeezer=squeezer)
    OPENED.append(store)
    put(store, toks(range(250)))
    assert store.flush(20)
    assert [block.form for block in tier.blocks.values()] == [Form.RAW] * 4


def test_off_is_off() -> None:
    store, memory, squeezer = setup(Compression.OFF, EVERY_FORM, 3 * SIZE)
    put(store, toks(range(250)))
    assert run(squeezer) == 0
    assert memory.statistics().bytes_by_form.keys() == {Form.RAW}


def test_lossless_goes_on_to_the_next_form() -> None:
    store, memory, squeezer = setup(Compression.AUTO, EVERY_FORM, 100 * SIZE)
    tokens = toks(range(64))
    put(store, tokens)
    seen = []
    for _ in range(3):
        memory.resize(memory.used_bytes)
        assert squeezer.step()
        seen.append(memory.fetch(store._trails.of(NAME, tokens), 0, 64)[0].form)
        assert cells_of(store.take(NAME, tokens, 0, 64)) == list(slab_of(tokens, 0, 64).cells)
    assert seen[0] is Form.LOSSLESS


def test_lossless_is_kept_only_where_it_pays_and_given_up_where_it_never_does() -> None:
    codec = NoisyCodec()
    store, memory, squeezer = setup(Compression.AUTO, frozenset({Form.RAW, Form.LOSSLESS, Form.Q8_0}), 1000 * SIZE, codec)
    put(store, toks(np.random.default_rng(1).integers(0, 1 << 31, 64 * 40).tolist()))
    before = memory.used_bytes
    for _ in range(40):
        memory.resize(memory.used_bytes)
        assert squeezer.step()
    assert memory.used_bytes == before
    assert squeezer._skips(Form.LOSSLESS)


def test_a_damaged_block_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    class Refusing(PlainCodec):
        def squeeze(self, payload: Bytes, form: Form) -> Bytes:
            raise EngineError("damaged")

    with caplog.at_level(logging.WARNING):
        store, memory, squeezer = setup(Compression.AUTO, LOSSY, 5 * SIZE, Refusing(pad_bytes=PAD))
        put(store, toks(range(250)))
        memory.resize(memory.used_bytes)
        assert run(squeezer) == 4
    assert memory.statistics().bytes_by_form.keys() == {Form.RAW}
    assert not caplog.records
