"""What several of the engine's tests start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from pasture.engine.settings import EngineSettings
from tests.gguf_factory import write_llama


@pytest.fixture
def quantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineSettings:
    """A tiny quantised model on a CPU, and a cache folder of its own for what is found out about it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.platform", "linux")
    path = write_llama(tmp_path / "m.gguf", quantised=True)
    return EngineSettings(model_path=str(path), n_cells=512, n_seqs=4, n_gpu_layers=0, use_extra_bufts=False)
