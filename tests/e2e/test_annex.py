"""Prompts computed in the annex on the real library: exactly what the pool would have computed, and nothing stale.

The models are tiny and random; every comparison is of whole rows of log probabilities. Where both sides computed in the same
chunks they agree but for the order in which a tile sums up its cells.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pasture.core.errors import DoesNotFit, EngineError, ModelError
from pasture.core.values import Form, Layout, Outcome, Segment, SeqId, StepPlan, StepResult, Work
from pasture.engine import llama
from pasture.engine import open as opening
from pasture.engine.annex import Annex
from pasture.engine.context import Context, Piece
from pasture.engine.llama import LlamaEngine
from pasture.engine.memory import MemoryPlan, plan_memory
from pasture.engine.settings import EngineSettings
from tests.engine_support import GREEDY, Hand, open_small
from tests.gguf_factory import N_VOCAB

TOKENS = [3 + (i * 37) % (N_VOCAB - 3) for i in range(300)]
OTHER_ORDER, OTHER_KERNEL = 1e-4, 1e-2


@pytest.fixture
def engine(models: Path) -> Iterator[LlamaEngine]:
    with closing(open_small(models / "llama.gguf", n_cells=2048, annex_cells=512)) as engine:
        yield engine


def compute(engine: LlamaEngine, *works: Work, n_apart: int = 0) -> StepResult:
    result = engine.execute(StepPlan((), works, n_apart))
    assert result.outcome is Outcome.DONE
    return result


def work(engine: LlamaEngine, sequence: int, p0: int, p1: int, *, in_annex: bool = True) -> Work:
    sampler = engine.sampler(GREEDY, [])
    return Work(SeqId(sequence), TOKENS[p0:p1], p0, sampler, engine.model.n_vocab, in_annex=in_annex)


def row(result: StepResult, sequence: int) -> NDArray[np.float64]:
    logprobs = result.samples[SeqId(sequence)].logprobs
    assert logprobs is not None
    found = dict(logprobs.top)
    return np.array([found[token] for token in range(len(found))])


def close(one: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
    return bool(np.abs(one - other).max() < OTHER_ORDER)


def test_a_prompt_is_the_same_from_either_cache(engine: LlamaEngine) -> None:
    hand = Hand(engine)
    hand.feed(0, TOKENS[:90], 0)
    hand.copy(0, 1, 0, 90)
    here = compute(engine, work(engine, 0, 90, 200, in_annex=False))
    there = compute(engine, work(engine, 1, 90, 200))
    assert close(row(here, 0), row(there, 1))
    assert (here.annex_seconds, here.moving_seconds) == (0, 0)
    assert 0 < there.annex_seconds == there.decode_seconds
    assert there.moving_seconds > 0
    assert close(hand.look(0, TOKENS[200:201], 200), hand.look(1, TOKENS[200:201], 200))
    saved = [hand.save(sequence, 0, 201) for sequence in (0, 1)]
    assert [slab.p1 for slab in saved] == [201, 201]


def test_a_prompt_in_chunks_is_moved_in_once(engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    hand = Hand(engine)
    for p0, p1 in ((0, 90), (90, 190), (190, 260)):
        hand.feed(0, TOKENS[p0:p1], p0)
    forgotten: list[int] = []
    forget = Annex.forget

    def counted(annex: Annex) -> None:
        forgotten.append(1)
        forget(annex)

    monkeypatch.setattr(Annex, "forget", counted)
    for p0, p1 in ((0, 90), (90, 190), (190, 260)):
        compute(engine, work(engine, 1, p0, p1))
    assert len(forgotten) == 1
    assert close(hand.look(0, TOKENS[260:261], 260), hand.look(1, TOKENS[260:261], 260))


def test_streams_and_two_prompts_in_one_step_draw_what_each_draws_alone(engine: LlamaEngine) -> None:
    hand, plain = Hand(engine), []
    for sequence, n in enumerate((50, 100, 70)):
        hand.feed(sequence, TOKENS[:n], 0)
    for sequence, (n, more) in enumerate(((50, 1), (100, 90), (70, 80))):
        plain.append(row(compute(engine, work(engine, sequence, n, n + more, in_annex=False)), sequence))
        hand.remove(sequence, n)
    one, two, three = work(engine, 0, 50, 51, in_annex=False), work(engine, 1, 100, 190), work(engine, 2, 70, 150)
    for works in ((one, two, three), (two, one, three)):
        together = compute(engine, *works)
        for sequence in range(3):
            assert np.abs(row(together, sequence) - plain[sequence]).max() < OTHER_KERNEL
            assert together.samples[SeqId(sequence)].token == int(row(together, sequence).argmax())
        assert together.annex_seconds < together.decode_seconds
        for sequence, n in enumerate((50, 100, 70)):
            hand.remove(sequence, n)


def test_a_short_prompt_is_filled_up_and_nothing_of_that_stays(engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    hand = Hand(engine)
    hand.feed(0, TOKENS[:90], 0)
    hand.copy(0, 1, 0, 90)
    filled_up_to: list[int] = []
    decode = Context.decode

    def seen(context: Context, pieces: list[Piece], pad_to: int = 0) -> tuple[int, float]:
        filled_up_to.append(pad_to)
        return decode(context, pieces, pad_to)

    monkeypatch.setattr(Context, "decode", seen)
    there = compute(engine, work(engine, 1, 90, 100))
    assert filled_up_to == [64]
    here = compute(engine, work(engine, 0, 90, 100, in_annex=False))
    assert np.abs(row(here, 0) - row(there, 1)).max() < OTHER_KERNEL
    assert np.abs(hand.look(0, TOKENS[100:101], 100) - hand.look(1, TOKENS[100:101], 100)).max() < OTHER_KERNEL


def test_what_the_pool_has_computed_meanwhile_is_moved_in(engine: LlamaEngine) -> None:
    hand = Hand(engine)
    for sequence, in_annex in ((0, False), (1, True)):
        compute(engine, work(engine, sequence, 0, 90, in_annex=in_annex))
        hand.feed(sequence, TOKENS[90:93], 90)
    here = compute(engine, work(engine, 0, 93, 180, in_annex=False))
    assert close(row(here, 0), row(compute(engine, work(engine, 1, 93, 180)), 1))


@pytest.mark.parametrize("how", ["removed", "restored", "copied"])
def test_what_changed_in_the_pool_is_not_taken_from_the_annex(engine: LlamaEngine, how: str) -> None:
    """The sequence has as many tokens as before, but others."""
    hand, other = Hand(engine), [*TOKENS[:89], TOKENS[89] % (N_VOCAB - 4) + 3]
    assert other != TOKENS[:90]
    compute(engine, work(engine, 1, 0, 90))
    hand.remove(1, 0)
    hand.feed(0, other, 0)
    match how:
        case "removed":
            hand.feed(1, other, 0)
        case "restored":
            hand.restore(1, hand.save(0, 0, 90))
        case _:
            hand.copy(0, 1, 0, 90)
    here = compute(engine, work(engine, 0, 90, 160, in_annex=False))
    there = compute(engine, work(engine, 1, 90, 160))
    assert close(row(here, 0), row(there, 1))


def test_without_room_in_the_pool_nothing_changes(models: Path) -> None:
    with closing(open_small(models / "llama.gguf", n_cells=512, annex_cells=512)) as engine:
        hand = Hand(engine)
        hand.feed(0, TOKENS[:250], 0)
        hand.feed(1, TOKENS[:100], 0)
        before = hand.look(1, TOKENS[100:101], 100)
        hand.remove(1, 100)
        result = engine.execute(StepPlan((), (work(engine, 0, 250, 251, in_annex=False), work(engine, 1, 100, 280))))
        assert result.outcome is Outcome.NO_ROOM
        assert close(hand.look(1, TOKENS[100:101], 100), before)
        hand.feed(0, TOKENS[250:252], 250)
        hand.remove(1, 100)
        again = compute(engine, work(engine, 1, 100, 190))
        hand.remove(1, 100)
        plain = compute(engine, work(engine, 1, 100, 190, in_annex=False))
        assert close(row(again, 1), row(plain, 1))


def test_what_found_no_room_is_not_what_the_pool_computes_later(models: Path) -> None:
    """Of the same length, by somebody who goes on from the same beginning."""
    with closing(open_small(models / "llama.gguf", n_cells=512, annex_cells=512)) as engine:
        hand = Hand(engine)
        hand.feed(0, TOKENS[:250], 0)
        compute(engine, work(engine, 1, 0, 100))
        assert engine.execute(StepPlan((), (work(engine, 1, 100, 280),))).outcome is Outcome.NO_ROOM
        hand.remove(0)
        hand.feed(1, TOKENS[279:99:-1], 100)
        there = compute(engine, work(engine, 1, 280, 300))
        hand.remove(1, 280)
        here = compute(engine, work(engine, 1, 280, 300, in_annex=False))
        assert np.abs(row(here, 1) - row(there, 1)).max() < OTHER_KERNEL


def test_it_stops_when_it_is_told_to(engine: LlamaEngine) -> None:
    hand = Hand(engine)
    hand.feed(1, TOKENS[:90], 0)
    engine.interrupt(True)
    result = engine.execute(StepPlan((), (work(engine, 1, 90, 260),)))
    engine.interrupt(False)
    assert result.outcome is Outcome.INTERRUPTED
    hand.feed(0, TOKENS[:90], 0)
    here = compute(engine, work(engine, 0, 90, 260, in_annex=False))
    assert close(row(compute(engine, work(engine, 1, 90, 260)), 1), row(here, 0))


def test_a_longer_prompt_is_refused(engine: LlamaEngine) -> None:
    with pytest.raises(EngineError, match="600 tokens up to position 600 in an annex of 512 cells"):
        engine.execute(StepPlan((), (Work(SeqId(0), TOKENS * 2, 0, None, in_annex=True),)))


def test_its_last_cells_are_used_though_there_is_no_room_to_fill_up(engine: LlamaEngine) -> None:
    long, hand = TOKENS * 2, Hand(engine)
    hand.feed(1, long[:500], 0)
    compute(engine, Work(SeqId(1), long[500:512], 500, None, in_annex=True))
    hand.feed(0, long[:500], 0)
    hand.feed(0, long[500:512], 500)
    assert np.abs(hand.look(0, long[512:513], 512) - hand.look(1, long[512:513], 512)).max() < OTHER_KERNEL


def test_it_is_there_where_it_gains_something(models: Path) -> None:
    for name, annex_cells in (("llama", 512), ("gemma3", 0), ("mamba", 0), ("falcon-h1", 0)):
        with closing(open_small(models / f"{name}.gguf", annex_cells=512)) as engine:
            assert engine.shape.annex_cells == annex_cells
            with pytest.raises(EngineError):
                engine.execute(StepPlan((), (Work(SeqId(0), TOKENS * 2, 0, None, in_annex=True),)))
    with closing(open_small(models / "wide.gguf", annex_cells=512, type_k="q8_0", type_v="q8_0")) as engine:
        assert engine.shape.annex_cells == 0
    with closing(open_small(models / "llama.gguf")) as engine:
        assert engine.shape.annex_cells == 0


def test_it_comes_and_goes_with_the_layout_and_the_form(models: Path) -> None:
    with closing(open_small(models / "wide.gguf", n_cells=2048, annex_cells=512)) as engine:
        comes_and_goes(engine)


def comes_and_goes(engine: LlamaEngine) -> None:
    hand = Hand(engine)
    hand.feed(0, TOKENS[:90], 0)
    segments = [Segment((SeqId(0),), 0, 90)]
    assert engine.rebuild(segments, Layout.STREAMS, 4).annex_cells == 0
    assert engine.rebuild(segments, Layout.UNIFIED, 4).annex_cells == 512
    shifted = engine.rebuild(segments, Layout.UNIFIED, 4, Form.Q8_0)
    assert shifted.annex_cells == 0
    assert shifted.n_cells == (2048 + 512) * 64 // 34 // 256 * 256, "its bytes are the pool's meanwhile"
    assert engine.rebuild(segments, Layout.UNIFIED, 4).n_cells == shifted.n_cells
    raw = engine.rebuild(segments, Layout.UNIFIED, 4, Form.RAW)
    assert (raw.n_cells, raw.annex_cells) == (2048, 512)
    hand.remove(0, 0)
    hand.feed(0, TOKENS[:90], 0)
    hand.copy(0, 1, 0, 90)
    here = compute(engine, work(engine, 0, 90, 200, in_annex=False))
    assert close(row(compute(engine, work(engine, 1, 90, 200)), 1), row(here, 0))


def test_it_is_there_again_after_a_shift_that_could_not_be_made(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(open_small(models / "wide.gguf", n_cells=2048, annex_cells=512)) as engine:
        hand = Hand(engine)
        hand.feed(0, TOKENS[:90], 0)
        monkeypatch.setattr(llama, "available_bytes", lambda: 0)
        with pytest.raises(DoesNotFit):
            engine.rebuild([Segment((SeqId(0),), 0, 90)], Layout.UNIFIED, 4, Form.Q8_0)
        assert (engine.shape.form, engine.shape.n_cells, engine.shape.annex_cells) == (Form.RAW, 2048, 512)
        hand.copy(0, 1, 0, 90)
        here = compute(engine, work(engine, 0, 90, 200, in_annex=False))
        assert close(row(compute(engine, work(engine, 1, 90, 200)), 1), row(here, 0))


def test_memory_for_the_pool_alone_is_enough_to_start(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_memory

    def tight(*args: object, **options: object) -> MemoryPlan:
        settings = args[1]
        assert isinstance(settings, EngineSettings)
        found = plan(*args, **options)  # type: ignore[arg-type]
        pool_only = plan(args[0], replace(settings, annex_cells=0), **options)  # type: ignore[arg-type]
        return MemoryPlan(found.cell_bytes, found.fixed_bytes, pool_only.needed_bytes(2048))

    monkeypatch.setattr(opening, "plan_memory", tight)
    with closing(open_small(models / "llama.gguf", n_cells=2048, annex_cells=512)) as engine:
        assert (engine.shape.n_cells, engine.shape.annex_cells) == (2048, 0)


def test_an_annex_that_cannot_be_made_is_no_reason_not_to_start(
    models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make = Context.__init__

    def refusing(self: Context, model: object, settings: object, layout: object, n_seqs: int, *rest: object) -> None:
        if n_seqs == 1:
            raise ModelError("no memory today")
        make(self, model, settings, layout, n_seqs, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Context, "__init__", refusing)
    with closing(open_small(models / "llama.gguf", annex_cells=512)) as engine:
        assert engine.shape.annex_cells == 0
    assert "prompts are computed in the pool alone: no memory today" in caplog.text
