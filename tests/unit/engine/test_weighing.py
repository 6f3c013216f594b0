"""Who chooses a model's weights: what is measured, when, and what is kept of it."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pasture.core.errors import ModelError
from pasture.core.values import Weights
from pasture.engine import bindings, trial, weighing, weights
from pasture.engine.open import open_engine
from pasture.engine.rates import DecodeRate, Rates
from pasture.engine.settings import EngineSettings
from pasture.engine.weighing import choose_weights
from pasture.engine.weights import expanded_bytes, loaded_file

FILE = Rates(300.0, (DecodeRate(1, 0.012), DecodeRate(8, 0.060)))
QUICK = Rates(600.0, (DecodeRate(1, 0.016), DecodeRate(8, 0.050)))


def measured(monkeypatch: pytest.MonkeyPatch, **rates: Rates) -> list[Weights]:
    """Replace the children: each weights' rates are as given. Returns what was measured."""
    asked: list[Weights] = []
    monkeypatch.setattr(bindings, "multiplies_bf16", lambda: "bf16" in rates)

    def found(quantised: EngineSettings) -> Rates:
        asked.append(quantised.weights)
        return rates[quantised.weights.value]

    monkeypatch.setattr(weighing, "_rates", found)
    return asked


def test_the_quicker_weights_are_chosen_and_kept(
    quantised: EngineSettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = measured(monkeypatch, file=FILE, f16=QUICK)
    with caplog.at_level(logging.WARNING):
        chosen, because = choose_weights(quantised)
    assert chosen == replace(quantised, weights=Weights.F16)
    assert "a prompt token takes 0.50 times" in because
    assert "a step of 1 1.33, a step of 8 0.83 times" in because
    assert asked == [Weights.FILE, Weights.F16] * 2, "in turn"
    assert not caplog.records, "nothing is wrong with it"
    asked = measured(monkeypatch)
    assert choose_weights(quantised) == (chosen, because)
    assert not asked


def test_a_cpu_that_multiplies_bf16_gets_a_copy_of_it(quantised: EngineSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, file=FILE, f16=FILE)
    assert choose_weights(quantised)[0].weights is Weights.FILE
    asked = measured(monkeypatch, file=FILE, bf16=QUICK)
    assert choose_weights(quantised)[0].weights is Weights.BF16, "what was found about f16 says nothing of it"
    assert asked == [Weights.FILE, Weights.BF16] * 2


@pytest.mark.parametrize(
    ("f16", "why"),
    [
        (Rates(310.0, FILE.decode), "hardly quicker"),
        (Rates(600.0, (DecodeRate(1, 0.024), DecodeRate(8, 0.050))), "who is alone waits twice as long"),
    ],
)
def test_weights_stay_as_they_are(quantised: EngineSettings, monkeypatch: pytest.MonkeyPatch, f16: Rates, why: str) -> None:
    measured(monkeypatch, file=FILE, f16=f16)
    assert choose_weights(quantised)[0].weights is Weights.FILE, why
    assert not list((Path(os.environ["XDG_CACHE_HOME"]) / "pasture" / "weights").glob("*.gguf")), (
        "the copy would lie there for nothing"
    )


def test_a_copy_that_somebody_asked_for_stays(quantised: EngineSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = loaded_file(replace(quantised, weights=Weights.F16))
    measured(monkeypatch, file=FILE, f16=FILE)
    assert choose_weights(quantised)[0].weights is Weights.FILE
    assert copy.exists()


def test_the_best_of_each_figure_counts() -> None:
    slow = Rates(200.0, (DecodeRate(1, 0.010), DecodeRate(8, 0.090)))
    assert Rates.best([FILE, slow]) == Rates(300.0, (DecodeRate(1, 0.010), DecodeRate(8, 0.060)))


def fails(reason: Exception) -> Callable[[EngineSettings], Rates]:
    def rates(_: EngineSettings) -> Rates:
        raise reason

    return rates


@pytest.mark.parametrize(
    "reason",
    [ModelError("a trial run was killed by SIGKILL"), subprocess.TimeoutExpired("python", 5.0), OSError(30, "read-only")],
)
def test_what_could_not_be_measured_is_said_and_asked_again(
    quantised: EngineSettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reason: Exception
) -> None:
    monkeypatch.setattr(weighing, "_rates", fails(reason))
    assert choose_weights(quantised)[0].weights is Weights.FILE
    assert "stay as they are in the file" in caplog.text
    measured(monkeypatch, file=FILE, f16=QUICK)
    assert choose_weights(quantised)[0].weights is Weights.F16


def test_a_copy_that_went_and_cannot_be_made_again_leaves_the_file(
    quantised: EngineSettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measured(monkeypatch, file=FILE, f16=QUICK)
    chosen, _ = choose_weights(quantised)
    loaded_file(chosen).unlink()

    monkeypatch.setattr(trial, "run", lambda *_: trial.Death("the disk is full"))
    assert choose_weights(quantised)[0].weights is Weights.FILE
    assert "the disk is full" in caplog.text
    with pytest.raises(ModelError, match="the disk is full"):
        open_engine(replace(quantised, weights=Weights.F16))


def test_a_copy_that_is_there_and_cannot_be_loaded_leaves_the_file(
    quantised: EngineSettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measured(monkeypatch, file=FILE, f16=QUICK)
    chosen, _ = choose_weights(quantised)
    copy = loaded_file(chosen)
    copy.write_bytes(copy.read_bytes().replace(b"llama", b"lLama"))
    engine = open_engine(quantised)
    assert engine.model.weights is Weights.FILE
    engine.close()
    assert f"{copy} cannot be loaded" in caplog.text
    engine = open_engine(quantised)
    assert engine.model.weights is Weights.F16, "made anew"
    engine.close()


def test_a_converter_that_crashes_ends_only_its_child(
    quantised: EngineSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    crashing = tmp_path / "python"
    crashing.write_text("#!/bin/sh\nkill -ABRT $$\n")
    crashing.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(crashing))
    with pytest.raises(ModelError, match="written out as f16: a trial run was killed by SIGABRT"):
        weights.have_copy(replace(quantised, weights=Weights.F16))


@pytest.mark.parametrize(
    "changes", [{"use_mmap": False}, {"use_mlock": True}, {"weights": Weights.FILE}, {"weights": Weights.F16}]
)
def test_nothing_is_measured_where_there_is_nothing_to_choose(
    quantised: EngineSettings, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    asked = measured(monkeypatch)
    wanted = replace(quantised, **changes)  # type: ignore[arg-type]
    expected = Weights.F16 if wanted.weights is Weights.F16 else Weights.FILE
    assert choose_weights(wanted)[0].weights is expected
    assert not asked


def test_a_gpu_computes_with_the_file_whatever_a_cpu_was_found_to_do(
    quantised: EngineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, file=FILE, f16=QUICK)
    everything = replace(quantised, n_gpu_layers=-1)
    monkeypatch.setattr(weighing, "has_gpu", lambda: False)
    assert choose_weights(everything)[0].weights is Weights.F16
    monkeypatch.setattr(weighing, "has_gpu", lambda: True)
    assert choose_weights(everything)[0].weights is Weights.FILE


def test_a_large_model_is_not_written_out_unasked(quantised: EngineSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = expanded_bytes(Path(quantised.model_path)) or 0
    for free, limit, expected in (
        (4 * needed, 1 << 40, Weights.F16),
        (4 * needed - 4, 1 << 40, Weights.FILE),
        (1 << 40, needed - 1, Weights.FILE),
    ):
        measured(monkeypatch, file=FILE, f16=QUICK)
        monkeypatch.setattr(weighing, "available_bytes", lambda free=free: free)
        monkeypatch.setattr(weighing, "_WORTH_TRYING_BYTES", limit)
        assert choose_weights(quantised)[0].weights is expected, "also where it was measured before"


def test_a_damaged_answer_is_asked_for_again(
    quantised: EngineSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured(monkeypatch, file=FILE, f16=QUICK)
    choose_weights(quantised)
    (kept,) = (tmp_path / "cache").rglob("*.json")
    for damage in ("", "[]", '{"better": 1, "because": ""}'):
        kept.write_text(damage)
        asked = measured(monkeypatch, file=FILE, f16=QUICK)
        choose_weights(quantised)
        assert asked


def test_the_children_measure_both_ways(quantised: EngineSettings) -> None:
    chosen, because = choose_weights(quantised)
    assert "times as long as with the file's own" in because
    assert chosen.weights in (Weights.FILE, Weights.BF16 if bindings.multiplies_bf16() else Weights.F16)


def test_a_child_that_dies_is_an_error(quantised: EngineSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "run", lambda *_: trial.Death("a trial run was killed by SIGILL"))
    with pytest.raises(ModelError, match="SIGILL"):
        weighing._rates(quantised)
