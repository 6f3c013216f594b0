"""Blocks and checkpoints of every family of models through bytes and back, and live caches shifted down and up again.

Rows of log probabilities after a restore must equal those before to the last bit, wherever the payload is not squeezed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pasture.core.errors import DoesNotFit, EngineError
from pasture.core.storage import Bytes
from pasture.core.values import Direction, Form, Layout, Outcome, Restore, Save, Segment, SeqId, Slab, StepPlan, Work
from pasture.engine.llama import LlamaEngine
from pasture.engine.quality import LIVE, RECOMPUTED, measure_quality
from tests.engine_support import GREEDY, Hand, open_small
from tests.gguf_factory import N_VOCAB

TOKENS = [3 + (i * 37) % (N_VOCAB - 3) for i in range(200)]
LAYOUTS = [Layout.UNIFIED, Layout.STREAMS]
EDGES = [0, 64, 128, 150]
KL_BOUND = 0.01


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    value = request.param
    assert isinstance(value, Layout)
    return value


@pytest.fixture(params=["llama", "gemma3", "wide"])
def hand(models: Path, request: pytest.FixtureRequest, layout: Layout) -> Iterator[Hand]:
    engine = open_small(models / f"{request.param}.gguf", layout=layout, n_cells=1024)
    yield Hand(engine)
    engine.close()


@pytest.fixture(params=["mamba", "falcon-h1"])
def state_hand(models: Path, request: pytest.FixtureRequest, layout: Layout) -> Iterator[Hand]:
    engine = open_small(models / f"{request.param}.gguf", layout=layout, n_cells=1024)
    yield Hand(engine)
    engine.close()


@pytest.fixture
def wide(models: Path) -> Iterator[Hand]:
    engine = open_small(models / "wide.gguf", n_cells=1024)
    yield Hand(engine)
    engine.close()


def packed(engine: LlamaEngine, slab: Slab, edges: Sequence[int]) -> list[tuple[Bytes, int, int]]:
    return [(engine.codec.pack(slab.cut(a, b)), a, b) for a, b in pairwise(edges)]


def unpacked(engine: LlamaEngine, blocks: Sequence[tuple[Bytes, int, int]]) -> tuple[Slab, ...]:
    return tuple(engine.codec.unpack(*block) for block in blocks)


def restore(hand: Hand, sequence: int, slabs: tuple[Slab, ...]) -> None:
    (transfer,) = hand.do(Restore(SeqId(sequence), slabs)).transfers
    assert transfer.direction is Direction.RESTORE
    assert transfer.n_tokens == slabs[-1].p1 - slabs[0].p0
    assert transfer.n_bytes == sum(slab.n_bytes for slab in slabs)
    assert transfer.seconds > 0


def divergence(expected: NDArray[np.float64], found: NDArray[np.float64]) -> float:
    return float((np.exp(expected) * (expected - found)).sum())


def test_blocks_through_bytes_are_exact(hand: Hand) -> None:
    hand.feed(0, TOKENS[:150], 0)
    (transfer,) = (result := hand.do(Save(SeqId(0), 0, 150, 1))).transfers
    assert (transfer.direction, transfer.n_tokens, transfer.n_bytes) == (Direction.SAVE, 150, result.saved[1].n_bytes)
    blocks = packed(hand.engine, result.saved[1], EDGES)
    expected = hand.look(0, TOKENS[150:155], 150)
    hand.empty()
    restore(hand, 1, unpacked(hand.engine, blocks))
    assert np.array_equal(hand.look(1, TOKENS[150:155], 150), expected)
    hand.remove(1, 100)
    part = packed(hand.engine, result.saved[1], [100, 128, 150])
    restore(hand, 1, unpacked(hand.engine, part))
    assert np.array_equal(hand.look(1, TOKENS[150:155], 150), expected)


def test_what_continues_a_prefix_goes_behind_it(hand: Hand) -> None:
    hand.feed(0, TOKENS[:70], 0)
    hand.copy(0, 1, 0, 70)
    hand.feed(1, TOKENS[70:150], 70)
    blocks = packed(hand.engine, hand.save(1, 0, 150), EDGES)
    expected = hand.look(1, TOKENS[150:155], 150)
    hand.remove(1)
    hand.copy(0, 2, 0, 64)
    restore(hand, 2, unpacked(hand.engine, blocks[1:]))
    assert np.array_equal(hand.look(2, TOKENS[150:155], 150), expected)


def test_blocks_move_between_layouts_and_servers(models: Path) -> None:
    for name in ("llama", "gemma3"):
        first = Hand(open_small(models / f"{name}.gguf", n_cells=1024))
        second = Hand(open_small(models / f"{name}.gguf", n_cells=2048, layout=Layout.STREAMS))
        assert first.engine.codec.fingerprint == second.engine.codec.fingerprint
        first.feed(0, TOKENS[:150], 0)
        restore(second, 3, unpacked(second.engine, packed(first.engine, first.save(0, 0, 150), EDGES)))
        expected = first.look(0, TOKENS[150:155], 150)
        assert divergence(expected, second.look(3, TOKENS[150:155], 150)) < 1e-4
        first.engine.close()
        second.engine.close()


@pytest.mark.parametrize("form", [Form.Q8_0, Form.Q4_0])
def test_squeezed_blocks_answer_nearly_the_same(wide: Hand, form: Form) -> None:
    wide.feed(0, TOKENS[:150], 0)
    codec = wide.engine.codec
    blocks = packed(wide.engine, wide.save(0, 0, 150), EDGES)
    expected = wide.look(0, TOKENS[150:155], 150)
    smaller = [(codec.squeeze(payload, form), p0, p1) for payload, p0, p1 in blocks]
    assert all(small.nbytes < payload.nbytes * 0.6 for (small, *_), (payload, *_) in zip(smaller, blocks, strict=True))
    restore(wide, 1, unpacked(wide.engine, smaller))
    found = wide.look(1, TOKENS[150:155], 150)
    assert not np.array_equal(found, expected)
    assert divergence(expected, found) < (KL_BOUND if form is Form.Q8_0 else 0.3)


def test_raw_and_squeezed_blocks_go_back_together(wide: Hand) -> None:
    wide.feed(0, TOKENS[:150], 0)
    codec = wide.engine.codec
    first, second, third = packed(wide.engine, wide.save(0, 0, 150), EDGES)
    expected = wide.look(0, TOKENS[150:155], 150)
    restore(wide, 1, unpacked(wide.engine, [first, (codec.squeeze(second[0], Form.Q8_0), 64, 128), third]))
    assert divergence(expected, wide.look(1, TOKENS[150:155], 150)) < KL_BOUND


def test_checkpoints_of_running_states_are_exact(state_hand: Hand) -> None:
    engine = state_hand.engine
    state_hand.feed(0, TOKENS[:64], 0)
    payload = engine.codec.pack(state_hand.save(0, 0, 64))
    expected = state_hand.look(0, TOKENS[64:70], 64)
    state_hand.feed(0, TOKENS[70:90], 70)
    assert engine.codec.squeeze(payload, Form.Q4_0) is payload
    restore(state_hand, 1, (engine.codec.unpack(payload, 0, 64),))
    assert np.array_equal(state_hand.look(1, TOKENS[64:70], 64), expected)
    restore(state_hand, 2, (engine.codec.unpack(payload, 0, 64),))
    assert np.array_equal(state_hand.look(2, TOKENS[64:70], 64), expected)


def test_a_state_that_is_not_the_models_is_refused(state_hand: Hand, models: Path) -> None:
    engine = state_hand.engine
    state_hand.feed(0, TOKENS[:64], 0)
    payload = engine.codec.pack(state_hand.save(0, 0, 64))
    for wrong in (payload[:-1], np.append(payload, np.uint8(0)), payload[:30]):
        with pytest.raises(EngineError):
            engine.codec.unpack(wrong, 0, 64)
    with pytest.raises(EngineError):
        engine.codec.unpack(payload, 0, 65)
    for name in ("llama", "mamba", "falcon-h1"):
        other = open_small(models / f"{name}.gguf")
        if other.model.architecture != engine.model.architecture:
            with pytest.raises(EngineError):
                other.codec.unpack(payload, 0, 64)
        other.close()


def test_a_state_whose_place_is_wrong_is_refused(state_hand: Hand) -> None:
    codec = state_hand.engine.codec
    state_hand.feed(0, TOKENS[:64], 0)
    payload = codec.pack(state_hand.save(0, 0, 64))
    moved = payload.copy()
    moved[12:16] = np.frombuffer((65).to_bytes(4, "little"), np.uint8)
    with pytest.raises(EngineError, match="position 65"):
        codec.unpack(moved, 0, 65)


# The live cache in another form


def test_shifted_down_there_are_more_cells_and_nearly_the_same_answers(wide: Hand, layout: Layout) -> None:
    engine, n_seqs = wide.engine, 2
    wide.feed(0, TOKENS[:60], 0)
    wide.copy(0, 1, 0, 60)
    wide.feed(0, TOKENS[60:90], 60)
    wide.feed(1, TOKENS[100:120], 60)
    kept = wide.save(0, 0, 90)
    expected = wide.look(0, TOKENS[:3], 90), wide.look(1, TOKENS[:3], 80)
    wide.remove(0, 90)
    wide.remove(1, 80)
    segments = [Segment((SeqId(0), SeqId(1)), 0, 60), Segment((SeqId(0),), 60, 90), Segment((SeqId(1),), 60, 80)]
    before = engine.rebuild(segments, layout, n_seqs)
    fingerprint = engine.codec.fingerprint
    shape = engine.rebuild(segments, layout, n_seqs, Form.Q8_0)
    assert shape == engine.shape
    assert (shape.form, shape.tile_tokens, shape.can_pad) == (Form.Q8_0, 1, False)
    assert 1.4 * before.n_cells < shape.n_cells <= 64 / 34 * before.n_cells
    found = wide.look(0, TOKENS[:3], 90), wide.look(1, TOKENS[:3], 80)
    assert all(divergence(one, other) < KL_BOUND for one, other in zip(expected, found, strict=True))
    wide.remove(0)
    restore(wide, 0, (kept,))
    assert divergence(expected[0], wide.look(0, TOKENS[:3], 90)) < KL_BOUND
    assert engine.codec.fingerprint == fingerprint
    wide.remove(0, 90)
    wide.remove(1, 80)
    segments = [Segment((SeqId(0),), 0, 90), Segment((SeqId(1),), 0, 80)]
    assert engine.rebuild(segments, layout, n_seqs).form is Form.Q8_0
    assert engine.rebuild(segments, layout, n_seqs, Form.RAW) == before
    assert divergence(expected[1], wide.look(1, TOKENS[:3], 80)) < KL_BOUND


def test_a_running_request_goes_on_through_a_shift(wide: Hand) -> None:
    engine = wide.engine
    sampler = engine.sampler(GREEDY, TOKENS[:40])
    drawn = engine.execute(StepPlan((), (Work(SeqId(0), TOKENS[:40], 0, sampler),))).samples[SeqId(0)].token
    engine.rebuild([Segment((SeqId(0),), 0, 40)], Layout.UNIFIED, 4, Form.Q8_0)
    result = engine.execute(StepPlan((), (Work(SeqId(0), [drawn], 40, sampler),)))
    assert result.outcome is Outcome.DONE
    assert SeqId(0) in result.samples


def test_saved_while_shifted_restores_in_both_forms(wide: Hand) -> None:
    engine = wide.engine
    wide.feed(0, TOKENS[:150], 0)
    expected = wide.look(0, TOKENS[150:155], 150)
    wide.remove(0, 150)
    engine.rebuild([Segment((SeqId(0),), 0, 150)], Layout.UNIFIED, 4, Form.Q8_0)
    slab = wide.save(0, 0, 150)
    blocks = packed(engine, slab, EDGES)
    shifted = wide.look(0, TOKENS[150:155], 150)
    restore(wide, 1, unpacked(engine, blocks))
    assert np.array_equal(wide.look(1, TOKENS[150:155], 150), shifted)
    engine.rebuild([], Layout.UNIFIED, 4, Form.RAW)
    restore(wide, 2, unpacked(engine, blocks))
    restore(wide, 3, (slab,))
    found = wide.look(2, TOKENS[150:155], 150)
    assert np.array_equal(wide.look(3, TOKENS[150:155], 150), found)
    assert divergence(expected, found) < KL_BOUND


@pytest.mark.parametrize("name", ["llama", "mamba", "falcon-h1"])
@pytest.mark.parametrize("form", [Form.Q8_0, Form.LOSSLESS])
def test_a_form_the_model_does_not_have_changes_nothing(models: Path, name: str, form: Form) -> None:
    """The plain tiny model has heads of 16: its rows could be quantised, llama.cpp's cache of them could not."""
    hand = Hand(open_small(models / f"{name}.gguf"))
    hand.feed(0, TOKENS[:50], 0)
    before = hand.engine.shape
    with pytest.raises(DoesNotFit):
        hand.engine.rebuild([Segment((SeqId(0),), 0, 50)], Layout.UNIFIED, 4, form)
    assert hand.engine.shape == before
    found = hand.look(0, TOKENS[50:55], 50)
    hand.empty()
    hand.feed(0, TOKENS[:50], 0)
    assert np.array_equal(hand.look(0, TOKENS[50:55], 50), found)
    hand.engine.close()


def test_shifting_back_needs_room(wide: Hand) -> None:
    engine = wide.engine
    engine.rebuild([], Layout.UNIFIED, 4, Form.Q8_0)
    for sequence in range(4):
        for start in range(0, 300, 100):
            wide.feed(sequence, TOKENS[:100], start)
    segments = [Segment((SeqId(sequence),), 0, 300) for sequence in range(4)]
    with pytest.raises(DoesNotFit, match="1200 cells"):
        engine.rebuild(segments, Layout.UNIFIED, 4, Form.RAW)
    assert engine.shape.form is Form.Q8_0
    wide.remove(3)
    assert engine.rebuild(segments[:3], Layout.UNIFIED, 4, Form.RAW).form is Form.RAW


def test_a_cache_configured_quantised_is_not_shifted(models: Path) -> None:
    engine = open_small(models / "wide.gguf", type_k="q8_0", type_v="q8_0")
    with pytest.raises(DoesNotFit):
        engine.rebuild([], Layout.UNIFIED, 4, Form.Q8_0)
    engine.close()


# What the forms do to the answers


def test_quality_compares_every_form_with_the_cache_as_it_was(wide: Hand) -> None:
    text = [TOKENS[i % 200] for i in range(0, 1000, 3)]
    figures = {one.name: one for one in measure_quality(wide.engine, [text, text[50:]], context_tokens=150, held_tokens=70)}
    assert list(figures) == ["raw", "q8_0", "q4_0", RECOMPUTED, LIVE]
    raw, q8, q4, live = (figures[name] for name in ("raw", "q8_0", "q4_0", LIVE))
    assert {one.n_tokens for one in figures.values()} == {140}
    assert (raw.kl_max, raw.top1_agreement) == (0, 1)
    assert raw.perplexity == raw.reference_perplexity == q4.reference_perplexity
    assert 0 < q8.kl_mean < q4.kl_mean
    assert 0 < live.kl_mean < KL_BOUND > q8.kl_mean
    assert q8.kl_mean <= q8.kl_p99 <= q8.kl_max
    assert raw.bytes_per_token > 1.7 * q8.bytes_per_token > 3 * q4.bytes_per_token
    assert wide.engine.shape.form is Form.RAW
    with pytest.raises(EngineError, match=r"holds \[0, 0\)"):
        wide.save(0, 0, 1)


def test_quality_needs_blocks_room_and_text(state_hand: Hand, wide: Hand) -> None:
    for hand, text, held in ((state_hand, TOKENS, 10), (wide, TOKENS, 2000), (wide, TOKENS[:60], 10), (wide, None, 10)):
        with pytest.raises(EngineError):
            measure_quality(hand.engine, [] if text is None else [text], context_tokens=50, held_tokens=held)
