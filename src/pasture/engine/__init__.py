"""The engine room: llama.cpp behind `pasture.core.ports.Engine`, and a fake of it.

`open_engine(EngineSettings(model_path=...))` is the way in; `probe_model` reads a file's facts without loading it. Importing
this package does not load the C library; opening an engine does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pasture.engine.probe import probe_model
from pasture.engine.settings import EngineSettings, OnProgress

if TYPE_CHECKING:
    from pasture.engine.llama import LlamaEngine

__all__ = ["EngineSettings", "OnProgress", "open_engine", "probe_model"]


def open_engine(settings: EngineSettings, on_progress: OnProgress | None = None) -> LlamaEngine:
    """See `pasture.engine.open.open_engine`."""
    from pasture.engine.open import open_engine as open_llama_engine

    return open_llama_engine(settings, on_progress)
