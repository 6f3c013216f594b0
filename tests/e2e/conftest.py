"""What several of these tests load: tiny random models, one of each family."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gguf_factory import write_falcon_h1, write_gemma3, write_llama, write_mamba


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with llama, wide (heads of 32, so that KV can be quantised), gemma3, mamba and falcon-h1, each `.gguf`."""
    folder = tmp_path_factory.mktemp("models")
    write_llama(folder / "llama.gguf")
    write_llama(folder / "wide.gguf", n_heads=2, n_kv_heads=1)
    write_gemma3(folder / "gemma3.gguf")
    write_mamba(folder / "mamba.gguf")
    write_falcon_h1(folder / "falcon-h1.gguf")
    return folder
