"""What makes stored KV wrong changes the fingerprint; what does not, leaves it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pasture.core.values import Layout
from pasture.engine import bindings
from pasture.engine.fingerprint import content_id, is_rotation_off, kv_fingerprint
from pasture.engine.gguf_header import model_files
from pasture.engine.settings import EngineSettings

LARGE = 200 << 20


@pytest.fixture
def settings(tmp_path: Path) -> EngineSettings:
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(range(256)) * 20)
    return EngineSettings(model_path=str(path))


def fingerprint(settings: EngineSettings, *, architecture: str = "llama", long_rope: bool = False) -> bytes:
    return kv_fingerprint(settings, architecture=architecture, long_rope=long_rope)


def test_what_computes_the_same_kv_has_one_fingerprint(settings: EngineSettings, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(Path(settings.model_path).read_bytes())
    known = fingerprint(settings)
    assert len(known) == 32
    for other in (
        replace(settings, n_cells=512, n_seqs=2, layout=Layout.STREAMS),
        replace(settings, n_threads=1, n_batch=64, n_ubatch=32, n_gpu_layers=0),
        replace(settings, model_path=str(copy)),
    ):
        assert fingerprint(other) == known


def test_what_changes_kv_changes_the_fingerprint(settings: EngineSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    quantised = replace(settings, type_k="q8_0", type_v="q8_0")
    seen = {
        fingerprint(settings),
        fingerprint(settings, architecture="gemma3"),
        fingerprint(settings, long_rope=True),
        fingerprint(replace(settings, type_k="q8_0")),
        fingerprint(replace(settings, type_v="q8_0")),
        fingerprint(quantised),
        fingerprint(replace(settings, flash_attn=False)),
    }
    monkeypatch.setenv(bindings.ROTATION_SWITCH, "1")
    seen |= {fingerprint(quantised)}
    plain = fingerprint(settings)
    assert plain in seen
    monkeypatch.setattr(bindings, "VERSION", "0.0.1")
    seen |= {fingerprint(settings)}
    path = Path(settings.model_path)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    seen |= {fingerprint(settings)}
    assert len(seen) == 10


@pytest.mark.parametrize(
    ("value", "off"), [("1", True), (" 2x", True), ("0", False), ("", False), ("yes", False), ("-1", True)]
)
def test_the_switch_is_read_as_the_library_reads_it(value: str, off: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(bindings.ROTATION_SWITCH, value)
    assert is_rotation_off() is off


def test_the_switch_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("0", None):
        if value is None:
            monkeypatch.delenv(bindings.ROTATION_SWITCH)
        else:
            monkeypatch.setenv(bindings.ROTATION_SWITCH, value)
        with bindings.without_rotation():
            assert is_rotation_off()
        assert not is_rotation_off()


def test_a_large_file_is_known_by_samples(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    with path.open("wb") as file:
        file.truncate(LARGE)
    known = content_id(path)
    for place in (0, 5 << 20, LARGE - 1):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        assert content_id(path) != known
        known = content_id(path)
    with path.open("r+b") as file:
        file.truncate(LARGE - 1)
    assert content_id(path) != known


def test_a_model_in_parts_is_all_of_them(tmp_path: Path) -> None:
    parts = [tmp_path / f"big-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    for part in parts:
        part.write_bytes(part.name.encode())
    assert model_files(parts[0]) == parts
    assert model_files(tmp_path / "alone.gguf") == [tmp_path / "alone.gguf"]
    first = fingerprint(EngineSettings(model_path=str(parts[0])))
    parts[2].write_bytes(b"another third part")
    assert fingerprint(EngineSettings(model_path=str(parts[0]))) != first
