"""The real library on tiny random models: exact sharing with and without sliding windows, states, failures.

Every comparison is of whole rows of log probabilities. Where the same tokens were computed in the same chunks they must be
equal to the last bit; across layouts and chunkings they agree within TOLERANCE.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from pasture.core.errors import DoesNotFit, EngineError, ModelError
from pasture.core.values import (
    Compact,
    Constraint,
    ConstraintKind,
    Form,
    Layout,
    Outcome,
    Release,
    SamplingParams,
    Segment,
    SeqId,
    Slab,
    StepPlan,
    Work,
)
from pasture.engine import relayout
from pasture.engine.assembly import Workbench, concatenate
from pasture.engine.blob import CacheKind, KvSlab, RowKind, Rows
from pasture.engine.context import Context, Piece
from pasture.engine.llama import LlamaEngine
from pasture.engine.relayout import Room, Sketch
from pasture.scheduler.costs import StepCosts
from pasture.scheduler.rehearsal import rehearse
from pasture.tiers.gate import CostGate
from tests.engine_support import GREEDY, Hand, open_small, small_settings
from tests.gguf_factory import N_VOCAB, write_llama

TOLERANCE = 2e-3
OTHER_KERNEL = 1e-2
"""a full tile is summed in f32, single rows in f16, in the order of their cells"""
TOKENS = [3 + (i * 37) % (N_VOCAB - 3) for i in range(200)]
LAYOUTS = [Layout.UNIFIED, Layout.STREAMS]


@pytest.fixture(params=["llama", "gemma3"])
def attention_model(models: Path, request: pytest.FixtureRequest) -> Path:
    return models / f"{request.param}.gguf"


@pytest.fixture(params=LAYOUTS)
def hand(attention_model: Path, request: pytest.FixtureRequest) -> Iterator[Hand]:
    engine = open_small(attention_model, layout=request.param, n_cells=1024)
    yield Hand(engine)
    engine.close()


@pytest.fixture(params=["mamba", "falcon-h1"])
def state_engine(models: Path, request: pytest.FixtureRequest) -> Iterator[LlamaEngine]:
    engine = open_small(models / f"{request.param}.gguf")
    yield engine
    engine.close()


def cold(hand: Hand, *chunks: list[int]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The row after the chunks in an empty cache."""
    hand.empty()
    start = 0
    for chunk in chunks[:-1]:
        hand.feed(3, chunk, start)
        start += len(chunk)
    row = hand.look(3, chunks[-1], start)
    hand.empty()
    return row


@pytest.mark.parametrize(
    ("family", "layout"),
    [(family, layout) for family in ("llama", "gemma3") for layout in LAYOUTS] + [("mamba", None), ("falcon-h1", None)],
)
def test_before_the_first_request_steps_and_transfers_are_measured_with_any_model(
    family: str, layout: Layout | None, models: Path
) -> None:
    changes: dict[str, object] = {} if layout is None else {"layout": layout, "n_cells": 1024}
    with closing(open_small(models / f"{family}.gguf", **changes)) as engine:
        costs, gate = StepCosts(0.4), CostGate(engine.model.cell_bytes)
        assumed = gate.figures()
        rehearse(engine, costs, gate)
        measured = gate.figures()
        assert measured.prefill_tokens_per_second == costs.tokens_per_second != assumed.prefill_tokens_per_second
        assert measured.save_bytes_per_second != assumed.save_bytes_per_second
        assert measured.restore_bytes_per_second != assumed.restore_bytes_per_second
        assert not any(engine._context.length(sequence) for sequence in range(engine.shape.n_seqs))


def test_a_copied_prefix_is_the_prefix(hand: Hand) -> None:
    tail = TOKENS[150:160]
    expected = cold(hand, TOKENS[:100], tail)
    hand.feed(0, TOKENS[:100], 0)
    hand.feed(0, TOKENS[100:140], 100)
    hand.copy(0, 1, 0, 100)
    assert np.allclose(hand.look(1, tail, 100), expected, atol=TOLERANCE)
    hand.remove(0)
    again = cold(hand, TOKENS[:100], TOKENS[100:110])
    hand.feed(0, TOKENS[:100], 0)
    hand.copy(0, 1, 0, 100)
    assert np.array_equal(hand.look(1, TOKENS[100:110], 100), again)


def test_a_scattered_reply_is_moved_together_and_stays_the_same(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hand = Hand(open_small(models / "llama.gguf"))
    hand.feed(0, TOKENS[:20], 0)
    for sequence in (1, 2, 3):
        hand.copy(0, sequence, 0, 20)
    for i in range(20, 44):
        for sequence in range(4):
            hand.feed(sequence, TOKENS[i : i + 1], i)
    expected = hand.look(3, TOKENS[44:48], 44)
    context = hand.engine._context
    assert context.left is not None
    moved = hand.save(1, 20, 44)
    joins: list[tuple[int, int, int, int]] = []
    join = context.join

    def joined(source: int, target: int, p0: int, p1: int) -> None:
        joins.append((source, target, p0, p1))
        join(source, target, p0, p1)

    monkeypatch.setattr(context, "join", joined)
    hand.engine.execute(StepPlan((Compact(SeqId(1), 20, 44),), ()))
    assert joins[-2:] == [(1, context.left, 20, 44), (context.scratch, 1, 20, 44)], "it holds the cells that were written anew"
    assert context.length(context.left) == 44, "nobody else gets the old ones"
    assert context.length(1) == 44
    again = hand.save(1, 20, 44)
    assert all(np.array_equal(a.data, b.data) for a, b in zip(rows_of(moved), rows_of(again), strict=True))
    assert np.allclose(hand.look(1, TOKENS[44:48], 44), expected, atol=OTHER_KERNEL)
    assert np.allclose(hand.look(2, TOKENS[44:48], 44), expected, atol=OTHER_KERNEL)
    hand.engine.execute(StepPlan((Release(),), ()))
    assert context.length(context.left) == 0
    assert context.length(1) == 48
    hand.engine.close()


def test_a_move_without_room_changes_nothing(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hand = Hand(open_small(models / "llama.gguf"))
    hand.feed(0, TOKENS[:40], 0)
    expected = hand.look(0, TOKENS[40:44], 40)
    hand.remove(0, 40)

    def no_room(*_: object) -> None:
        raise EngineError("no room")

    monkeypatch.setattr(hand.engine._context, "write_state", no_room)
    hand.engine.execute(StepPlan((Compact(SeqId(0), 10, 40),), ()))
    assert np.array_equal(hand.look(0, TOKENS[40:44], 40), expected)
    hand.engine.close()


def rows_of(slab: Slab) -> list[Rows]:
    assert isinstance(slab, KvSlab)
    return [rows for cache in slab.caches for rows in (*cache.keys, *cache.values)]


def test_the_donor_is_untouched(hand: Hand) -> None:
    expected = cold(hand, TOKENS[:80], TOKENS[80:90])
    hand.feed(0, TOKENS[:80], 0)
    hand.copy(0, 1, 0, 40)
    hand.feed(1, TOKENS[150:170], 40)
    hand.remove(1)
    assert np.array_equal(hand.look(0, TOKENS[80:90], 80), expected)


@pytest.mark.parametrize("p0", [0, 33])
def test_a_part_goes_out_and_comes_back(hand: Hand, p0: int) -> None:
    expected = cold(hand, TOKENS[:120], TOKENS[120:125])
    hand.feed(0, TOKENS[:120], 0)
    slab = hand.save(0, p0, 120)
    assert slab.n_bytes == (120 - p0) * hand.engine.model.cell_bytes
    if p0:
        hand.copy(0, 1, 0, p0)
    hand.remove(0)
    hand.restore(1, slab)
    assert np.array_equal(hand.look(1, TOKENS[120:125], 120), expected)


@pytest.mark.parametrize("ready_bytes", [1, 1 << 20])
def test_many_slabs_come_back_at_once(hand: Hand, monkeypatch: pytest.MonkeyPatch, ready_bytes: int) -> None:
    """In portions that each hold one of them, and in a single one."""
    monkeypatch.setattr(Workbench, "READY_BYTES", ready_bytes)
    expected = cold(hand, TOKENS[:120], TOKENS[120:125])
    hand.feed(0, TOKENS[:120], 0)
    blocks = [hand.save(0, a, min(a + 50, 120)) for a in range(0, 120, 50)]
    hand.copy(0, 1, 0, 50)
    hand.remove(0)
    hand.restore(1, *blocks[1:])
    hand.restore(2, *blocks)
    for sequence in (1, 2):
        assert np.array_equal(hand.look(sequence, TOKENS[120:125], 120), expected)


def test_blocks_go_out_and_come_back(hand: Hand) -> None:
    expected = cold(hand, TOKENS[:120], TOKENS[120:125])
    hand.feed(0, TOKENS[:120], 0)
    blocks = [hand.save(0, a, min(a + 50, 120)) for a in range(0, 120, 50)]
    whole = hand.save(0, 0, 120)
    hand.remove(0)
    for block in blocks:
        hand.restore(2, block)
    assert np.array_equal(hand.look(2, TOKENS[120:125], 120), expected)
    hand.empty()
    assert all(isinstance(block, KvSlab) for block in blocks)
    hand.restore(0, concatenate([block for block in blocks if isinstance(block, KvSlab)]))
    assert np.array_equal(hand.look(0, TOKENS[120:125], 120), expected)
    hand.empty()
    hand.restore(0, whole.cut(0, 70))
    hand.restore(0, whole.cut(70, 120))
    assert np.array_equal(hand.look(0, TOKENS[120:125], 120), expected)


def test_a_prefix_far_behind_the_window_survives_a_busy_cache(hand: Hand) -> None:
    """A sliding-window cache hands out old cells of a lone sequence; the guards forbid it."""
    tail = TOKENS[190:200]
    expected = cold(hand, TOKENS[:20], tail)
    hand.feed(1, TOKENS[:100], 0)
    hand.feed(0, TOKENS[:20], 0)
    hand.feed(0, TOKENS[20:120], 20)
    hand.remove(1)
    for start in range(0, 120, 40):
        hand.feed(2, TOKENS[start : start + 40], start)
    hand.copy(0, 1, 0, 20)
    assert np.allclose(hand.look(1, tail, 20), expected, atol=TOLERANCE)


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
def test_rebuilt_caches_hold_the_same(attention_model: Path, first: Layout, second: Layout) -> None:
    hand = Hand(open_small(attention_model, layout=first, n_cells=1024))
    expected = [cold(hand, TOKENS[:60], tail, TOKENS[:3]) for tail in (TOKENS[60:90], TOKENS[100:120])]
    hand.feed(0, TOKENS[:60], 0)
    hand.copy(0, 1, 0, 60)
    hand.feed(0, TOKENS[60:90], 60)
    hand.feed(1, TOKENS[100:120], 60)
    segments = [
        Segment((SeqId(0), SeqId(1)), 0, 60),
        Segment((SeqId(0),), 60, 90),
        Segment((SeqId(1),), 60, 80),
    ]
    sampler = hand.engine.sampler(GREEDY, TOKENS)
    for layout, n_seqs in ((second, 4), (second, 2), (first, 4)):
        shape = hand.engine.rebuild(segments, layout, n_seqs)
        assert (shape.layout, shape.n_seqs) == (layout, n_seqs)
        assert shape == hand.engine.shape
    hand.copy(0, 2, 0, 60)
    assert np.allclose(hand.look(0, TOKENS[:3], 90), expected[0], atol=TOLERANCE)
    assert np.allclose(hand.look(1, TOKENS[:3], 80), expected[1], atol=TOLERANCE)
    assert np.allclose(hand.look(2, [*TOKENS[60:90], *TOKENS[:3]], 60), expected[0], atol=TOLERANCE)
    sampler.close()
    hand.engine.close()


def test_a_rebuild_that_does_not_fit_changes_nothing(models: Path) -> None:
    hand = Hand(open_small(models / "llama.gguf", n_cells=1024))
    expected = cold(hand, TOKENS, TOKENS[:100], TOKENS[:5])
    hand.feed(0, TOKENS, 0)
    hand.feed(0, TOKENS[:100], 200)
    segments = [Segment((SeqId(0),), 0, 300)]
    with pytest.raises(DoesNotFit, match="longer than the 256"):
        hand.engine.rebuild(segments, Layout.STREAMS, 4)
    with pytest.raises(DoesNotFit, match="256"):
        hand.engine.rebuild(segments, Layout.STREAMS, 5)
    assert np.array_equal(hand.look(0, TOKENS[:5], 300), expected)
    hand.engine.close()


def test_a_context_that_cannot_be_made_brings_the_old_one_back(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hand = Hand(open_small(models / "llama.gguf", n_cells=1024))
    expected = cold(hand, TOKENS[:50], TOKENS[50:55])
    hand.feed(0, TOKENS[:50], 0)
    failures = iter([True, True, False])

    def fail_once(*args: object) -> object:
        if next(failures):
            raise DoesNotFit("no memory")
        return Context(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("pasture.engine.llama.Context", fail_once)
    with pytest.raises(DoesNotFit, match="no memory"):
        hand.engine.rebuild([Segment((SeqId(0),), 0, 50)], Layout.STREAMS, 2)
    assert hand.engine.shape.layout is Layout.UNIFIED
    assert np.array_equal(hand.look(0, TOKENS[50:55], 50), expected)
    hand.engine.close()


def test_an_engine_that_gets_no_cache_back_is_lost_and_says_so(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hand = Hand(open_small(models / "llama.gguf", n_cells=1024))
    hand.feed(0, TOKENS[:50], 0)

    def fail(*args: object) -> object:
        raise DoesNotFit("no memory")

    monkeypatch.setattr("pasture.engine.llama.Context", fail)
    with pytest.raises(EngineError, match="cache is lost"):
        hand.engine.rebuild([Segment((SeqId(0),), 0, 50)], Layout.STREAMS, 2)
    for call in (
        lambda: hand.feed(0, TOKENS[50:55], 50),
        lambda: hand.save(0, 0, 50),
        lambda: hand.engine.rebuild([], Layout.UNIFIED, 4),
        lambda: hand.engine.logits_after(SeqId(0), TOKENS[50:51], 50),
    ):
        with pytest.raises(EngineError, match="no live cache any more"):
            call()
    assert hand.engine.shape.layout is Layout.UNIFIED
    hand.engine.close()


def test_a_move_that_fails_midway_leaves_the_cache_as_it_was(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hand = Hand(open_small(models / "llama.gguf", n_cells=1024))
    expected = cold(hand, TOKENS[:50], TOKENS[50:55])
    hand.feed(0, TOKENS[:50], 0)

    def fail(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr("pasture.engine.llama.fill", fail)
    with pytest.raises(MemoryError):
        hand.engine.rebuild([Segment((SeqId(0),), 0, 50)], Layout.STREAMS, 2)
    assert hand.engine.shape.layout is Layout.UNIFIED
    assert np.array_equal(hand.look(0, TOKENS[50:55], 50), expected)
    hand.engine.close()


@pytest.mark.parametrize(("both_fit", "fits"), [(True, True), (False, True), (False, False)])
def test_a_move_asks_first_for_the_memory_it_takes(
    models: Path, monkeypatch: pytest.MonkeyPatch, both_fit: bool, fits: bool
) -> None:
    hand = Hand(open_small(models / "llama.gguf", n_cells=1024, n_gpu_layers=0))
    hand.feed(0, TOKENS[:50], 0)
    expected = hand.look(0, TOKENS[50:55], 50)
    hand.remove(0, 50)
    old = hand.engine._context
    stood: list[bool] = []

    def make(*args: object) -> Context:
        stood.append(not old.closed)
        return Context(*args)  # type: ignore[arg-type]

    segments = [Segment((SeqId(0),), 0, 50)]
    kinds = hand.engine._kinds_in(Form.RAW)
    sketches = [Sketch(hand.engine._settings, kinds, *where) for where in ((Layout.UNIFIED, 4), (Layout.STREAMS, 2))]
    room = Room.of(segments, hand.engine._model, *sketches)
    assert room.through_memory_bytes < room.beside_bytes
    free = room.beside_bytes if both_fit else room.through_memory_bytes if fits else 1 << 20
    monkeypatch.setattr("pasture.engine.llama.Context", make)
    monkeypatch.setattr("pasture.engine.llama.available_bytes", lambda: free)
    if fits:
        assert hand.engine.rebuild(segments, Layout.STREAMS, 2).layout is Layout.STREAMS
        assert stood == [both_fit]
    else:
        for layout, n_seqs in ((Layout.STREAMS, 2), (Layout.UNIFIED, 4)):
            with pytest.raises(DoesNotFit, match="takes 64 MiB"):
                hand.engine.rebuild(segments, layout, n_seqs)
        assert not stood
    assert np.allclose(hand.look(0, TOKENS[50:55], 50), expected, atol=TOLERANCE)
    hand.engine.rebuild([], hand.engine.shape.layout, hand.engine.shape.n_seqs)
    hand.engine.close()


def test_what_a_stream_is_read_for_counts_once_for_each_part() -> None:
    settings = small_settings(Path("none"), n_cells=1024)
    kinds = (CacheKind(0, (RowKind(1, 10),), (RowKind(1, 10),)),)
    shared = [Segment((SeqId(0), SeqId(1)), 0, 60), Segment((SeqId(0),), 60, 90), Segment((SeqId(1),), 60, 80)]
    unified, streams = (Sketch(settings, kinds, layout, 4) for layout in LAYOUTS)
    assert relayout._gathered_bytes(shared, unified) == 20 * (60 + 30 + 20)
    assert relayout._gathered_bytes(shared, streams) == 20 * (90 + 90 + 80)


def test_the_shape_is_what_the_library_made(models: Path) -> None:
    for layout, n_cells, n_seqs, expected in (
        (Layout.UNIFIED, 1000, 4, 768),
        (Layout.UNIFIED, 10, 4, 256),
        (Layout.STREAMS, 2000, 3, 1536),
    ):
        engine = open_small(models / "llama.gguf", layout=layout, n_cells=n_cells, n_seqs=n_seqs)
        assert engine.shape.n_cells == expected
        assert engine.shape.n_batch <= engine.shape.n_cells
        engine.close()
    with pytest.raises(DoesNotFit, match="768 cells or fewer"):
        open_small(models / "llama.gguf", layout=Layout.STREAMS, n_cells=500, n_seqs=3)


@pytest.mark.parametrize(("name", "expected"), [("llama", 254), ("gemma3", 127)])
def test_sequence_ids_are_capped(models: Path, name: str, expected: int) -> None:
    engine = open_small(models / f"{name}.gguf", n_seqs=300)
    assert engine.shape.n_seqs == expected
    hand = Hand(engine)
    hand.feed(expected - 1, TOKENS[:10], 0)
    hand.restore(0, hand.save(expected - 1, 0, 10))
    engine.close()


@pytest.mark.parametrize("n_apart", [0, 1, 2])
def test_works_apart_draw_what_works_together_draw(models: Path, n_apart: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_small(models / "llama.gguf", n_cells=1024)
    hand = Hand(engine)
    expected = []
    for sequence, tokens in enumerate(([5, 6, 7], [8, 9], [10, 11, 12, 13])):
        hand.feed(sequence, tokens, 0)
        expected.append(hand.look(sequence, [20 + sequence], len(tokens)))
        hand.remove(sequence, len(tokens))
    sizes: list[int] = []
    decode = Context.decode

    def counted(context: Context, pieces: list[Piece], pad_to: int = 0) -> tuple[int, float]:
        sizes.append(len(pieces))
        return decode(context, pieces, pad_to)

    monkeypatch.setattr(Context, "decode", counted)
    n_vocab = engine.model.n_vocab
    works = tuple(Work(SeqId(i), [20 + i], n, engine.sampler(GREEDY, []), n_vocab) for i, n in enumerate((3, 2, 4)))
    result = engine.execute(StepPlan((), works, n_apart))
    assert sizes == ([n_apart, 3 - n_apart] if n_apart else [3])
    assert (result.apart_seconds > 0) == (n_apart > 0)
    assert result.apart_seconds < result.decode_seconds
    for sequence, wanted in enumerate(expected):
        logprobs = result.samples[SeqId(sequence)].logprobs
        assert logprobs is not None
        found = np.array([dict(logprobs.top)[token] for token in range(n_vocab)])
        assert np.abs(found - wanted).max() < OTHER_KERNEL
    engine.close()


@pytest.mark.parametrize("layout", list(Layout))
def test_padding_is_read_by_nobody_and_leaves_nothing(models: Path, layout: Layout) -> None:
    engine = open_small(models / "llama.gguf", n_cells=1024)
    engine.rebuild([], layout, 4)
    hand = Hand(engine)
    hand.feed(0, [5, 6, 7, 8], 0)
    expected = hand.look(0, [9, 10, 11], 4)
    hand.remove(0, 4)
    pads = 60 if layout is Layout.STREAMS else 0
    work = Work(SeqId(0), [9, 10, 11], 4, engine.sampler(GREEDY, []), engine.model.n_vocab, pads)
    result = engine.execute(StepPlan((), (work,), pad_to=0 if pads else 64))
    logprobs = result.samples[SeqId(0)].logprobs
    assert logprobs is not None
    found = np.array([dict(logprobs.top)[token] for token in range(engine.model.n_vocab)])
    assert np.abs(found - expected).max() < OTHER_KERNEL
    after = hand.look(0, [12], 7)
    hand.feed(1, [5, 6, 7, 8], 0)
    hand.feed(1, [9, 10, 11], 4)
    assert np.abs(after - hand.look(1, [12], 7)).max() < OTHER_KERNEL
    hand.remove(1, 0)
    hand.feed(1, [1] * 200, 0)
    engine.close()


def test_no_room_changes_nothing(hand: Hand) -> None:
    room = hand.engine.shape.cells_per_sequence
    expected = cold(hand, TOKENS, TOKENS[:5])
    hand.feed(0, TOKENS, 0)
    too_many = [TOKENS[i % 200] for i in range(room - 200 + 1)]
    result = hand.engine.execute(StepPlan((), (Work(SeqId(0), too_many, 200, None),)))
    assert result.outcome is Outcome.NO_ROOM
    assert np.array_equal(hand.look(0, TOKENS[:5], 200), expected)


@pytest.mark.parametrize("n_batch", [32, 7])
def test_a_plan_larger_than_a_batch_is_split(models: Path, n_batch: int) -> None:
    whole, split = (Hand(open_small(models / "llama.gguf", n_batch=n)) for n in (512, n_batch))
    works = [(0, TOKENS[:10]), (1, TOKENS[:60]), (2, TOKENS[100:101]), (3, TOKENS[50:75])]
    drawn = []
    for hand in (whole, split):
        samplers = [hand.engine.sampler(GREEDY, []) for _ in works]
        plan = StepPlan((), tuple(Work(SeqId(i), tokens, 0, s, 3) for (i, tokens), s in zip(works, samplers, strict=True)))
        result = hand.engine.execute(plan)
        assert result.outcome is Outcome.DONE
        drawn.append({i: sample.token for i, sample in result.samples.items()})
        hand.engine.close()
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("code", "outcome"), [(1, Outcome.NO_ROOM), (2, Outcome.FAILED), (-2, Outcome.FAILED), (-3, Outcome.FAILED)]
)
def test_a_failure_in_the_middle_is_undone(hand: Hand, monkeypatch: pytest.MonkeyPatch, code: int, outcome: Outcome) -> None:
    expected = cold(hand, TOKENS[:20], TOKENS[20:25])
    hand.feed(0, TOKENS[:20], 0)
    context = hand.engine._context
    decode = context.decode
    calls = iter([False, True, False])

    def fail_second(pieces: list[Piece], pad_to: int = 0) -> tuple[int, float]:
        done, seconds = decode(pieces)
        return (code, seconds) if next(calls) else (done, seconds)

    monkeypatch.setattr(hand.engine, "_shape", type(context.shape)(1024, 4, context.shape.layout, 16))
    monkeypatch.setattr(context, "decode", fail_second)
    sampler = hand.engine.sampler(SamplingParams(seed=5, repeat_penalty=1.3), TOKENS[:20])
    works = (Work(SeqId(0), TOKENS[100:104], 20, sampler), Work(SeqId(1), TOKENS[:20], 0, None))
    result = hand.engine.execute(StepPlan((), works))
    assert result.outcome is outcome
    assert not result.samples
    assert not result.lost
    assert context.length(0) == 20
    assert context.length(1) == 0
    monkeypatch.undo()
    assert np.array_equal(hand.look(0, TOKENS[20:25], 20), expected)


def test_impossible_plans_raise(hand: Hand) -> None:
    hand.feed(0, TOKENS[:10], 0)
    slab = hand.save(0, 0, 10)
    sampler = hand.engine.sampler(GREEDY, [])
    for works in (
        (Work(SeqId(4), [5], 0, sampler),),
        (Work(SeqId(1), [5], 0, None), Work(SeqId(1), [6], 1, None)),
        (Work(SeqId(1), [], 0, None),),
        (Work(SeqId(1), [N_VOCAB + 5], 0, None),),
        (Work(SeqId(0), [5], 25, None),),
    ):
        with pytest.raises(EngineError):
            hand.engine.execute(StepPlan((), works))
    with pytest.raises(EngineError, match="does not continue"):
        hand.restore(0, slab)
    with pytest.raises(EngineError, match="cannot be saved"):
        hand.save(0, 5, 11)
    with pytest.raises(EngineError, match="no sequence 9"):
        hand.copy(0, 9, 0, 10)
    with pytest.raises(EngineError, match="does not continue"):
        hand.restore(1, slab.cut(5, 10))


@pytest.mark.parametrize("ready_bytes", [1, 1 << 20])
def test_a_restore_without_room_leaves_the_sequence_as_it_was(
    models: Path, monkeypatch: pytest.MonkeyPatch, ready_bytes: int
) -> None:
    monkeypatch.setattr(Workbench, "READY_BYTES", ready_bytes)
    hand = Hand(open_small(models / "llama.gguf", n_cells=256))
    hand.feed(0, TOKENS[:150], 0)
    whole = hand.save(0, 0, 150)
    slabs = [whole.cut(a, a + 50) for a in (0, 50, 100)]
    hand.copy(0, 2, 0, 10)
    for sequence, length, parts in ((1, 0, slabs), (2, 10, [whole.cut(10, 50), *slabs[1:]])):
        with pytest.raises(EngineError, match="could not be restored"):
            hand.restore(sequence, *parts)
        assert hand.engine._context.length(sequence) == length
    hand.engine.close()


def test_states_are_kept_whole(state_engine: LlamaEngine) -> None:
    hand = Hand(state_engine)
    assert not state_engine.model.shareable
    expected = cold(hand, TOKENS[:30], TOKENS[30:33])
    hand.feed(0, TOKENS[:30], 0)
    slab = hand.save(0, 0, 30)
    hand.copy(0, 1, 0, 30)
    assert np.array_equal(hand.look(1, TOKENS[30:33], 30), expected)
    assert np.array_equal(hand.look(0, TOKENS[30:33], 30), expected)
    hand.remove(0)
    hand.restore(0, slab)
    assert np.array_equal(hand.look(0, TOKENS[30:33], 30), expected)
    for wrong in (lambda: hand.copy(0, 2, 0, 20), lambda: hand.save(0, 0, 20), lambda: hand.remove(0, 20)):
        with pytest.raises(EngineError):
            wrong()


def test_a_state_that_cannot_be_cut_back_is_lost(state_engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    hand = Hand(state_engine)
    hand.feed(0, TOKENS[:30], 0)
    context = state_engine._context
    decode = context.decode
    monkeypatch.setattr(context, "decode", lambda pieces, pad_to=0: (2, decode(pieces)[1]))
    result = state_engine.execute(StepPlan((), (Work(SeqId(0), [5, 6], 30, None), Work(SeqId(1), [5], 0, None))))
    assert result.outcome is Outcome.FAILED
    assert result.lost == {SeqId(0)}
    assert context.length(0) == context.length(1) == 0


def test_states_compact_and_do_not_move(state_engine: LlamaEngine) -> None:
    hand = Hand(state_engine)
    expected = cold(hand, TOKENS[:30], TOKENS[30:33])
    hand.feed(0, TOKENS[:30], 0)
    segments = [Segment((SeqId(0),), 0, 30)]
    state_engine.rebuild(segments, Layout.UNIFIED, 4)
    with pytest.raises(DoesNotFit, match="cannot move"):
        state_engine.rebuild(segments, Layout.STREAMS, 2)
    assert np.array_equal(hand.look(0, TOKENS[30:33], 30), expected)


def test_quantised_kv_goes_out_and_comes_back(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="block size"):
        open_small(models / "llama.gguf", type_k="q8_0", type_v="q8_0")
    path = write_llama(tmp_path / "wide.gguf", n_heads=2, n_kv_heads=1)
    hand = Hand(open_small(path, type_k="q8_0", type_v="q8_0"))
    assert hand.engine.model.cell_bytes == 2 * (34 + 34)
    expected = cold(hand, TOKENS[:40], TOKENS[40:44])
    hand.feed(0, TOKENS[:40], 0)
    slab = hand.save(0, 0, 40)
    hand.remove(0)
    hand.restore(1, slab)
    assert np.array_equal(hand.look(1, TOKENS[40:44], 40), expected)
    hand.engine.close()


def test_broken_files_are_one_clear_line(models: Path, tmp_path: Path) -> None:
    content = (models / "llama.gguf").read_bytes()
    broken = tmp_path / "broken.gguf"
    for damaged in (
        content[:2000],
        content[: len(content) // 2],
        content[:-100],
        content.replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"),
        content.replace(b"general.architecture\x08\x00\x00\x00\x05", b"general.architecture\x08\x00\x00\x00\x05").replace(
            b"\x05\x00\x00\x00\x00\x00\x00\x00llama", b"\x05\x00\x00\x00\x00\x00\x00\x00lhama", 1
        ),
    ):
        broken.write_bytes(damaged)
        for self_check in (False, True):
            with pytest.raises(ModelError) as caught:
                open_small(broken, self_check=self_check)
            assert "\n" not in str(caught.value)
            assert "broken.gguf" in str(caught.value)


FORM = Constraint(ConstraintKind.REGEX, "[a-f]{3}")


@pytest.mark.parametrize("free", [GREEDY, SamplingParams(seed=3)])
def test_a_bound_reply_leaves_its_neighbours_in_the_batch_alone(models: Path, free: SamplingParams) -> None:
    written: dict[Constraint | None, list[list[int]]] = {}
    for constraint in (None, FORM):
        engine = open_small(models / "llama.gguf")
        params = [free, SamplingParams(temperature=0, constraint=constraint), SamplingParams(seed=1, constraint=constraint)]
        samplers = [engine.sampler(one, TOKENS[:8]) for one in params]
        feeds = [TOKENS[i * 20 : i * 20 + 8] for i in range(3)]
        tokens = written[constraint] = [[], [], []]
        for step in range(3):
            start = 0 if step == 0 else 7 + step
            works = tuple(Work(SeqId(i), feed, start, samplers[i], 2) for i, feed in enumerate(feeds))
            samples = engine.execute(StepPlan((), works)).samples
            feeds = [[samples[SeqId(i)].token] for i in range(3)]
            for i in range(3):
                tokens[i].append(samples[SeqId(i)].token)
        assert [samples[SeqId(i)].is_last for i in range(3)] == [False, constraint is not None, constraint is not None]
        texts = [b"".join(map(engine.vocabulary.piece, reply)) for reply in tokens]
        assert constraint is None or all(re.fullmatch(b"[a-f]{3}", text) for text in texts[1:])
        engine.close()
    assert written[FORM][0] == written[None][0]


def test_a_row_from_which_nothing_can_be_drawn_fails_alone(models: Path) -> None:
    engine = open_small(models / "llama.gguf")
    banned = SamplingParams(constraint=FORM, logit_bias=dict.fromkeys(range(N_VOCAB), -np.inf))
    samplers = [engine.sampler(params, [5]) for params in (GREEDY, banned)]
    result = engine.execute(StepPlan((), tuple(Work(SeqId(i), TOKENS[:8], 0, samplers[i]) for i in range(2))))
    assert set(result.samples) == {SeqId(0)}
    assert set(result.refused) == {SeqId(1)}
    assert "logit_bias" in str(result.refused[SeqId(1)])
    engine.close()


def test_closing_twice_is_safe(models: Path) -> None:
    engine = open_small(models / "llama.gguf")
    sampler = engine.sampler(SamplingParams(seed=1), TOKENS)
    engine.close()
    engine.close()
    sampler.close()
    sampler.close()
