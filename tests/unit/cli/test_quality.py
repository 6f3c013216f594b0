"""The table of `pasture bench quality`; the measuring has its tests where it lives."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from pasture.bench.options import BenchOptions
from pasture.cli.quality import Measured, main, model_settings, table
from pasture.core.values import Weights
from pasture.engine.quality import LIVE, RECOMPUTED, FormQuality


def form(name: str, kl: float) -> FormQuality:
    return FormQuality(name, 256, 12_240.0, kl, 10 * kl, 20 * kl, 0.9688, 7.975, 7.976)


def test_every_form_has_a_row_that_says_what_it_is() -> None:
    console = Console(file=io.StringIO(), width=160)
    console.print(table(Measured(Weights.F16, tuple(form(name, 0.003) for name in ("raw", "q8_0", RECOMPUTED, LIVE)))))
    text = str(console.file.getvalue())  # type: ignore[attr-defined]
    for said in ("stored f16, lossless", "stored q8_0", f"computed in {RECOMPUTED}", LIVE, "0.003", "0.03", "96.88%", "12,240"):
        assert said in text


def test_the_benchmarks_settings_are_the_servers() -> None:
    settings = model_settings(BenchOptions(threads=3), kv_compress="q8_0")
    assert (settings.threads, settings.kv_compress) == (3, "q8_0")


def test_a_model_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(BenchOptions(model=tmp_path / "absent.gguf")) == 1
    assert "no model file at" in capsys.readouterr().err.replace("\n", " ")
