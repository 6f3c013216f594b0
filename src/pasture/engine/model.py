"""A model in memory: load, facts, vocabulary, free.

`Model` owns the C model and frees it in `close`. Contexts made from it must be gone by then. Loading is the slow part of a
start and happens once; the context on top of it may be rebuilt many times.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from pasture.core.errors import ModelError
from pasture.core.values import ModelInfo, Weights
from pasture.engine import bindings
from pasture.engine.bindings import Handle, lib
from pasture.engine.gguf_header import GgufHeader, read_header
from pasture.engine.probe import probe_model
from pasture.engine.settings import EngineSettings, OnProgress
from pasture.engine.vocabulary import LlamaVocabulary
from pasture.engine.weights import loaded_file

_LOAD_MODES = {
    (False, False): bindings.LOAD_READ,
    (True, False): bindings.LOAD_MMAP,
    (False, True): bindings.LOAD_MLOCK,
    (True, True): bindings.LOAD_MMAP_MLOCK,
}


@dataclass(slots=True)
class Model:
    """A loaded model. `close` frees it; using it afterwards is an error."""

    handle: Handle
    info: ModelInfo
    vocabulary: LlamaVocabulary
    window_tokens: int
    """of sliding-window attention; 0 without"""
    rope_switch_tokens: int = 0
    """above this many cells a sequence the library uses other rope factors; 0 where there is one set of them"""
    n_embd: int = 0
    closed: bool = False

    def uses_long_rope(self, cells_per_sequence: int) -> bool:
        """Which of two sets of rope factors a context of this size computes with; stored KV suits only the same one."""
        return bool(self.rope_switch_tokens) and cells_per_sequence > self.rope_switch_tokens

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.vocabulary.close()
            lib.llama_model_free(self.handle)


def load_model(settings: EngineSettings, on_progress: OnProgress | None = None) -> Model:
    """Load the file. `on_progress` hears the share that is read, 0 to 1. Raises ModelError with the library's own reason."""
    info = probe_model(settings.model_path, type_k=settings.type_k, type_v=settings.type_v)
    bindings.initialise()
    params = lib.llama_model_default_params()
    params.n_gpu_layers = settings.n_gpu_layers
    params.load_mode = _LOAD_MODES[settings.use_mmap, settings.use_mlock]
    params.use_extra_bufts = bool(settings.use_extra_bufts)
    params.main_gpu = settings.main_gpu
    if settings.tensor_split:
        shares = (ctypes.c_float * int(lib.llama_max_devices()))(*settings.tensor_split)
        params.tensor_split = shares
    hears = bindings.progress_callback(on_progress)  # held until it is loaded
    if hears is not None:
        params.progress_callback = hears
    path = Path(settings.model_path)
    file = loaded_file(settings)
    with bindings.library_log.errors() as reasons:
        handle = bindings.handle(lib.llama_model_load_from_file(str(file).encode(), params))
        if handle is None and file != path:
            with suppress(OSError):
                file.unlink()  # it may be damaged: whoever wants it next makes another
        if handle is None:
            raise ModelError(f"{file} cannot be loaded: {_reason(reasons)}")
    model = handle
    if lib.llama_model_has_encoder(model) or not lib.llama_model_has_decoder(model):
        lib.llama_model_free(model)
        raise ModelError(f"{settings.model_path} ({info.architecture}) is not a decoder-only language model")
    vocabulary = LlamaVocabulary(handle)
    if not vocabulary.n_tokens:
        lib.llama_model_free(model)
        raise ModelError(f"{settings.model_path} has no vocabulary")
    stateful = bool(lib.llama_model_is_recurrent(model) or lib.llama_model_is_hybrid(model))
    info = replace(
        info,
        description=bindings.model_description(handle) if file == path else info.description,
        n_params=int(lib.llama_model_n_params(model)),
        n_vocab=vocabulary.n_tokens,
        n_layers=int(lib.llama_model_n_layer(model)),
        n_ctx_train=int(lib.llama_model_n_ctx_train(model)),
        shareable=not stateful and settings.flash_attn,
        weights=Weights.FILE if file == path else settings.weights,
        loaded_path=str(file),
    )
    return Model(
        handle,
        info,
        vocabulary,
        window_tokens=int(lib.llama_model_n_swa(model)),
        rope_switch_tokens=_rope_switch(read_header(settings.model_path)),
        n_embd=int(lib.llama_model_n_embd(model)),
    )


def _rope_switch(header: GgufHeader) -> int:
    """llama.cpp, get_rope_factors: long factors above the original context, short ones up to it."""
    has_two = any(name.endswith("rope_factors_long.weight") for name in header.tensor_names)
    return header.number("rope.scaling.original_context_length", header.number("context_length")) if has_two else 0


def _reason(lines: object) -> str:
    """The most telling of the library's error lines: the first, without the function's name before it."""
    texts = [str(line) for line in cast("list[str]", lines)]
    if not texts:
        return "the library gave no reason"
    telling = next((text for text in texts if "error loading model" in text), texts[0])
    return telling.split(": ", 1)[-1] if telling.startswith("llama_") else telling
