"""Model files read without llama.cpp: facts, sizes, and files that are none."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pasture.core.errors import ConfigError, ModelError
from pasture.engine.gguf_header import read_header
from pasture.engine.probe import probe_model, row_bytes
from tests.gguf_factory import N_VOCAB, write_falcon_h1, write_gemma3, write_llama, write_mamba


def complaint(path: Path) -> ModelError | None:
    try:
        probe_model(path)
    except ModelError as error:
        return error
    return None


def test_the_facts_of_a_plain_model(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "llama.gguf")
    info = probe_model(path)
    assert (info.architecture, info.n_layers, info.n_vocab, info.n_ctx_train) == ("llama", 2, N_VOCAB, 512)
    assert info.shareable
    assert info.cell_bytes == 2 * 2 * (2 * 16) * 2  # K and V, layers, KV heads of 16, two bytes
    assert info.n_bytes == path.stat().st_size


def test_quantised_kv_is_smaller(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "llama.gguf")
    assert probe_model(path, type_k="q8_0", type_v="q4_0").cell_bytes == 2 * (34 + 18)
    with pytest.raises(ConfigError, match="q9"):
        row_bytes(32, "q9")


def test_states_are_not_shared(tmp_path: Path) -> None:
    assert probe_model(write_gemma3(tmp_path / "g.gguf")).shareable
    assert not probe_model(write_mamba(tmp_path / "m.gguf")).shareable
    assert probe_model(tmp_path / "m.gguf").cell_bytes == 0
    assert not probe_model(write_falcon_h1(tmp_path / "f.gguf")).shareable


def test_files_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model file"):
        read_header(tmp_path / "absent.gguf")
    with pytest.raises(ModelError, match="not a file"):
        read_header(tmp_path)
    other = tmp_path / "other.gguf"
    for content in (b"", b"PK\x03\x04", b"hello, this is text"):
        other.write_bytes(content)
        with pytest.raises(ModelError, match="not a GGUF"):
            read_header(other)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(share=st.floats(0, 0.999))
def test_every_truncation_is_one_clear_error(tmp_path: Path, share: float) -> None:
    path = tmp_path / "whole.gguf"
    if not path.exists():
        write_llama(path)
    content = path.read_bytes()
    short = tmp_path / "short.gguf"
    short.write_bytes(content[: max(4, int(len(content) * share))])
    assert complaint(short) is None or "cut short" in str(complaint(short))


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(at=st.integers(4, 3000), flip=st.integers(1, 255))
def test_a_flipped_byte_never_crashes(tmp_path: Path, at: int, flip: int) -> None:
    path = tmp_path / "whole.gguf"
    if not path.exists():
        write_llama(path)
    content = bytearray(path.read_bytes())
    content[at] ^= flip
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(content)
    assert "\n" not in str(complaint(damaged))


def test_more_layers_than_tensors_are_refused_at_once(tmp_path: Path) -> None:
    """A flipped bit in the number of layers would otherwise be counted to, one by one."""
    path = write_llama(tmp_path / "whole.gguf")
    content = path.read_bytes()
    key = b"llama.block_count\x04\x00\x00\x00"
    at = content.index(key) + len(key)
    path.write_bytes(content[:at] + (1 << 30).to_bytes(4, "little") + content[at + 4 :])
    assert "1073741824 layers" in str(complaint(path))
