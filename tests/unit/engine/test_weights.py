"""Weights written out: which file is loaded, when a copy is made, and who chooses."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from pasture.core.errors import ModelError
from pasture.core.values import Layout, ModelInfo, Weights
from pasture.engine import weights
from pasture.engine.fingerprint import kv_fingerprint
from pasture.engine.gguf_header import read_header
from pasture.engine.memory import plan_memory
from pasture.engine.model import load_model
from pasture.engine.probe import probe_model
from pasture.engine.relayout import Sketch
from pasture.engine.settings import EngineSettings
from pasture.engine.weights import expanded_bytes, loaded_file
from tests.gguf_factory import write_llama


def copies(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "pasture" / "weights").glob("*.gguf"))


def test_as_in_the_file_is_the_file(quantised: EngineSettings, tmp_path: Path) -> None:
    for choice in (Weights.FILE, Weights.AUTO):
        assert loaded_file(replace(quantised, weights=choice)) == Path(quantised.model_path)
    assert not copies(tmp_path)


def test_a_file_that_is_not_quantised_has_no_copy(quantised: EngineSettings, tmp_path: Path) -> None:
    plain = write_llama(tmp_path / "plain.gguf")
    assert expanded_bytes(plain) is None
    assert loaded_file(replace(quantised, model_path=str(plain), weights=Weights.F16)) == plain


@pytest.mark.parametrize("form", [Weights.F16, Weights.BF16])
def test_the_copy_is_made_once_and_computes(quantised: EngineSettings, tmp_path: Path, form: Weights) -> None:
    wanted = replace(quantised, weights=form)
    copy = loaded_file(wanted)
    assert copies(tmp_path) == [copy]
    assert {entry.name for entry in copy.parent.iterdir()} == {copy.name, "lock"}, "nothing of its making is left"
    assert read_header(copy).n_params == read_header(quantised.model_path).n_params
    assert {"f16": 1, "bf16": 30}[form] in read_header(copy).tensor_types, "as GGML numbers it"
    made_at = copy.stat().st_ino
    assert loaded_file(wanted).stat().st_ino == made_at
    model = load_model(wanted)
    assert model.info.weights is form
    assert (model.info.path, model.info.n_bytes) == (quantised.model_path, os.path.getsize(quantised.model_path))
    model.close()


def test_a_copy_that_is_cut_short_is_made_again(quantised: EngineSettings) -> None:
    wanted = replace(quantised, weights=Weights.F16)
    copy = loaded_file(wanted)
    whole = copy.read_bytes()
    copy.write_bytes(whole[: len(whole) // 2])
    assert loaded_file(wanted).read_bytes() == whole
    copy.write_bytes(b"")
    assert loaded_file(wanted).read_bytes() == whole


def test_a_copy_that_cannot_be_loaded_is_made_anew_by_the_next_start(quantised: EngineSettings) -> None:
    wanted = replace(quantised, weights=Weights.F16)
    copy = loaded_file(wanted)
    whole = copy.read_bytes()
    copy.write_bytes(whole.replace(b"llama", b"lLama"))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(wanted)
    model = load_model(wanted)
    model.close()
    assert copy.read_bytes() == whole


def test_who_starts_in_the_same_moment_makes_one_copy(quantised: EngineSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def slowly(source: Path, target: Path, _: Weights) -> None:
        made.append(target)
        time.sleep(0.1)
        shutil.copyfile(source, target)

    monkeypatch.setattr(weights, "expand_weights", slowly)
    monkeypatch.setattr(weights, "_is_whole", lambda copy, _: copy.exists())
    with ThreadPoolExecutor(4) as starts:
        found = set(starts.map(lambda _: loaded_file(replace(quantised, weights=Weights.F16)), range(4)))
    assert len(made) == len(found) == 1


def test_each_form_has_its_copy(quantised: EngineSettings, tmp_path: Path) -> None:
    made = {loaded_file(replace(quantised, weights=form)) for form in (Weights.F16, Weights.BF16)}
    assert set(copies(tmp_path)) == made
    assert len(made) == 2


def test_another_file_under_the_same_name_has_another_copy(quantised: EngineSettings, tmp_path: Path) -> None:
    wanted = replace(quantised, weights=Weights.F16)
    first = loaded_file(wanted)
    write_llama(Path(quantised.model_path), n_ff=64, quantised=True)
    assert loaded_file(wanted) != first
    assert len(copies(tmp_path)) == 2


def test_what_nobody_has_loaded_for_long_is_removed_when_another_is_made(quantised: EngineSettings, tmp_path: Path) -> None:
    wanted = replace(quantised, weights=Weights.F16)
    old = loaded_file(wanted)
    abandoned = old.parent / "making-of-a-process-that-was-killed"
    abandoned.mkdir()
    (abandoned / "f16.gguf").write_bytes(b"half")
    long_ago = time.time() - 40 * 86400
    os.utime(old, (long_ago, long_ago))
    loaded_file(wanted)
    assert old.stat().st_mtime > long_ago + 86400, "loading it made it young"
    other = write_llama(tmp_path / "other.gguf", n_ff=64, quantised=True)
    os.utime(old, (long_ago, long_ago))
    copy = loaded_file(replace(wanted, model_path=str(other)))
    assert copies(tmp_path) == [copy]
    assert not abandoned.exists()


def test_no_room_for_the_copy_is_one_clear_line(quantised: EngineSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(ModelError, match=r"takes \d+ bytes.*has 10 left"):
        loaded_file(replace(quantised, weights=Weights.F16))


def test_a_cache_folder_that_cannot_be_written_is_one_clear_line(
    quantised: EngineSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot be written out as f16 to"):
        loaded_file(replace(quantised, weights=Weights.F16))


def test_kv_is_filed_by_the_file_alone(quantised: EngineSettings) -> None:
    marks = {kv_fingerprint(replace(quantised, weights=choice), architecture="llama", long_rope=False) for choice in Weights}
    assert len(marks) == 1


def test_weights_that_are_read_count_as_what_they_take(quantised: EngineSettings) -> None:
    info: ModelInfo = replace(probe_model(quantised.model_path), n_params=10 << 20, n_bytes=6 << 20)
    read = replace(quantised, use_mmap=False)
    as_in_file = plan_memory(info, read, n_embd=64, available=0).fixed_bytes
    for form in (Weights.F16, Weights.BF16):
        written_out = plan_memory(info, replace(read, weights=form), n_embd=64, available=0).fixed_bytes
        assert written_out - as_in_file == 14 << 20
    plain = replace(info, n_bytes=40 << 20)
    as_f32 = plan_memory(plain, replace(read, weights=Weights.F16), n_embd=64, available=0).fixed_bytes
    assert as_f32 - as_in_file == 34 << 20, "a file of f32 has no copy"


def test_a_move_counts_no_weights(quantised: EngineSettings) -> None:
    """They are there already, however they were loaded."""
    model = load_model(quantised)
    taken = {
        Sketch(replace(quantised, weights=choice, use_mmap=False), (), Layout.UNIFIED, 4).context_bytes(model)
        for choice in (Weights.FILE, Weights.F16)
    }
    model.close()
    assert len(taken) == 1


def test_all_parts_of_a_model_count(quantised: EngineSettings, tmp_path: Path) -> None:
    whole = probe_model(quantised.model_path)
    for number in (1, 2):
        shutil.copyfile(quantised.model_path, tmp_path / f"split-{number:05d}-of-00002.gguf")
    parts = probe_model(tmp_path / "split-00001-of-00002.gguf")
    assert (parts.n_params, parts.n_bytes) == (2 * whole.n_params, 2 * whole.n_bytes)
    assert expanded_bytes(tmp_path / "split-00001-of-00002.gguf") == 2 * (expanded_bytes(Path(quantised.model_path)) or 0)
