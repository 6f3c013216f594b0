"""Weights written out as f16: which file is loaded, when a copy is made, and who chooses."""

from __future__ import annotations

import logging
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pasture.core.errors import ModelError
from pasture.core.values import ModelInfo, Weights
from pasture.engine import selfcheck, weights
from pasture.engine.fingerprint import kv_fingerprint
from pasture.engine.gguf_header import read_header
from pasture.engine.memory import plan_memory
from pasture.engine.model import load_model
from pasture.engine.probe import probe_model
from pasture.engine.rates import DecodeRate, Rates
from pasture.engine.selfcheck import Trial, Verdict, examine
from pasture.engine.settings import EngineSettings
from pasture.engine.weights import expanded_bytes, loaded_file, worth_trying
from tests.gguf_factory import write_llama

FILE = Rates(300.0, (DecodeRate(1, 0.012), DecodeRate(8, 0.060)))
QUICK = Rates(600.0, (DecodeRate(1, 0.016), DecodeRate(8, 0.050)))


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineSettings:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.platform", "linux")
    path = write_llama(tmp_path / "m.gguf", quantised=True)
    return EngineSettings(model_path=str(path), n_cells=512, n_seqs=4, n_gpu_layers=0, use_extra_bufts=False)


def copies(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "pasture" / "weights").glob("*"))


def measured(monkeypatch: pytest.MonkeyPatch, **rates: Rates | None) -> list[Weights]:
    """Replace the children: the trial lives, and each weights' rates are as given. Returns what was measured."""
    asked: list[Weights] = []

    def found(settings: EngineSettings) -> Rates | None:
        asked.append(settings.weights)
        return rates[settings.weights.value]

    monkeypatch.setattr(selfcheck, "_run_child", lambda _: Trial())
    monkeypatch.setattr(selfcheck, "_rates", found)
    return asked


# Files


def test_as_in_the_file_is_the_file(settings: EngineSettings, tmp_path: Path) -> None:
    for choice in (Weights.FILE, Weights.AUTO):
        assert loaded_file(replace(settings, weights=choice)) == Path(settings.model_path)
    assert not copies(tmp_path)


def test_a_file_that_is_not_quantised_has_no_copy(settings: EngineSettings, tmp_path: Path) -> None:
    plain = write_llama(tmp_path / "plain.gguf")
    assert expanded_bytes(plain) is None
    assert loaded_file(replace(settings, model_path=str(plain), weights=Weights.F16)) == plain
    assert not worth_trying(plain, 1 << 40)


def test_the_copy_is_made_once_and_computes(settings: EngineSettings, tmp_path: Path) -> None:
    wanted = replace(settings, weights=Weights.F16)
    copy = loaded_file(wanted)
    assert copies(tmp_path) == [copy], "nothing of its making is left"
    assert read_header(copy).n_params == read_header(settings.model_path).n_params
    made_at = copy.stat().st_ino
    assert loaded_file(wanted).stat().st_ino == made_at
    model = load_model(wanted)
    assert model.info.weights is Weights.F16
    assert (model.info.path, model.info.n_bytes) == (settings.model_path, os.path.getsize(settings.model_path))
    model.close()


def test_a_copy_that_is_cut_short_is_made_again(settings: EngineSettings) -> None:
    wanted = replace(settings, weights=Weights.F16)
    copy = loaded_file(wanted)
    whole = copy.read_bytes()
    copy.write_bytes(whole[: len(whole) // 2])
    assert loaded_file(wanted).read_bytes() == whole
    copy.write_bytes(b"")
    assert loaded_file(wanted).read_bytes() == whole


def test_another_file_under_the_same_name_has_another_copy(settings: EngineSettings, tmp_path: Path) -> None:
    wanted = replace(settings, weights=Weights.F16)
    first = loaded_file(wanted)
    write_llama(Path(settings.model_path), n_ff=64, quantised=True)
    assert loaded_file(wanted) != first
    assert len(copies(tmp_path)) == 2


def test_what_nobody_has_loaded_for_long_is_removed_when_another_is_made(settings: EngineSettings, tmp_path: Path) -> None:
    wanted = replace(settings, weights=Weights.F16)
    old = loaded_file(wanted)
    abandoned = old.parent / "making-of-a-process-that-was-killed"
    abandoned.mkdir()
    (abandoned / "f16.gguf").write_bytes(b"half")
    long_ago = time.time() - 40 * 86400
    for path in (old, abandoned):
        os.utime(path, (long_ago, long_ago))
    loaded_file(wanted)
    assert old.exists(), "loading it made it young"
    other = write_llama(tmp_path / "other.gguf", n_ff=64, quantised=True)
    os.utime(old, (long_ago, long_ago))
    copy = loaded_file(replace(wanted, model_path=str(other)))
    assert copies(tmp_path) == [copy]


def test_no_room_for_the_copy_is_one_clear_line(settings: EngineSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(ModelError, match=r"takes \d+ bytes.*has 10 left"):
        loaded_file(replace(settings, weights=Weights.F16))


def test_a_cache_folder_that_cannot_be_written_is_one_clear_line(
    settings: EngineSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot be written out as f16 to"):
        loaded_file(replace(settings, weights=Weights.F16))


def test_kv_is_filed_by_the_file_alone(settings: EngineSettings) -> None:
    marks = {kv_fingerprint(replace(settings, weights=choice), architecture="llama", long_rope=False) for choice in Weights}
    assert len(marks) == 1


def test_weights_that_are_read_count_as_what_they_take(settings: EngineSettings) -> None:
    info: ModelInfo = replace(probe_model(settings.model_path), n_params=10 << 20, n_bytes=6 << 20)
    read = replace(settings, use_mmap=False)
    as_in_file = plan_memory(info, read, n_embd=64, available=0).fixed_bytes
    written_out = plan_memory(info, replace(read, weights=Weights.F16), n_embd=64, available=0).fixed_bytes
    assert written_out - as_in_file == 14 << 20


# The choice


def test_the_quicker_weights_are_chosen_and_kept(
    settings: EngineSettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = measured(monkeypatch, file=FILE, f16=QUICK)
    with caplog.at_level(logging.WARNING):
        verdict = examine(settings)
    assert verdict.apply(settings).weights is Weights.F16
    assert "a prompt token takes 0.50 times" in verdict.weights_because
    assert "a step of 1 1.33, a step of 8 0.83 times" in verdict.weights_because
    assert asked == [Weights.FILE, Weights.F16]
    assert not caplog.records, "nothing is wrong with it"
    measured(monkeypatch)
    assert examine(settings) == verdict


@pytest.mark.parametrize(
    ("f16", "why"),
    [
        (Rates(310.0, FILE.decode), "hardly quicker"),
        (Rates(600.0, (DecodeRate(1, 0.024), DecodeRate(8, 0.050))), "who is alone waits twice as long"),
        (None, "the child died"),
    ],
)
def test_weights_stay_as_they_are(
    settings: EngineSettings, monkeypatch: pytest.MonkeyPatch, f16: Rates | None, why: str
) -> None:
    measured(monkeypatch, file=FILE, f16=f16)
    assert examine(settings).weights is Weights.FILE, why


def test_a_copy_that_cannot_be_made_leaves_the_file(settings: EngineSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: EngineSettings) -> Rates:
        raise ModelError("the disk is full")

    monkeypatch.setattr(selfcheck, "_run_child", lambda _: Trial())
    monkeypatch.setattr(selfcheck, "_rates", fails)
    assert examine(settings).weights is Weights.FILE


@pytest.mark.parametrize(
    "changes", [{"use_mmap": False}, {"use_mlock": True}, {"weights": Weights.FILE}, {"weights": Weights.F16}]
)
def test_nothing_is_measured_where_there_is_nothing_to_choose(
    settings: EngineSettings, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    asked = measured(monkeypatch)
    wanted = replace(settings, **changes)  # type: ignore[arg-type]
    assert examine(wanted).weights is (Weights.F16 if wanted.weights is Weights.F16 else Weights.FILE)
    assert not asked


def test_a_gpu_computes_with_the_file(settings: EngineSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = measured(monkeypatch)
    monkeypatch.setattr(selfcheck, "has_gpu", lambda: True)
    assert examine(replace(settings, n_gpu_layers=-1)).weights is Weights.FILE
    assert not asked


def test_a_large_model_is_not_written_out_unasked(settings: EngineSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(settings.model_path)
    needed = expanded_bytes(path) or 0
    assert worth_trying(path, 4 * needed)
    assert not worth_trying(path, 4 * needed - 4), "a quarter of what is free"
    monkeypatch.setattr(weights, "_WORTH_TRYING_BYTES", needed - 1)
    assert not worth_trying(path, 4 * needed)


def test_the_children_measure_both_ways(settings: EngineSettings) -> None:
    verdict: Verdict = examine(settings)
    assert "times as long as with the file's own" in verdict.weights_because
    assert verdict.weights in (Weights.FILE, Weights.F16)
