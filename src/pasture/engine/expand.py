"""A model file with its weights written out as f16: the same function, computed without rounding activations.

llama.cpp multiplies quantised weights with activations that it quantises too. That turns the smallest change of a key or a
value into a visible change of the answer, so on such a file nothing but equal bits comes close, and what a form of KV does by
itself cannot be seen. Measured on the expanded file, it can. Uses the library's own converter. Stateless.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from pasture.core.errors import ModelError
from pasture.engine import bindings
from pasture.engine.bindings import lib
from pasture.engine.gguf_header import read_header
from pasture.engine.settings import default_threads

_MOSTLY_F16 = 1
"""LLAMA_FTYPE_MOSTLY_F16"""


def expand_weights(source: Path, target: Path) -> None:
    """Write `source` with f16 weights to `target`: two bytes a parameter. Raises ModelError where that cannot be done."""
    read_header(source)
    bindings.initialise()
    params = lib.llama_model_quantize_default_params()
    params.ftype = _MOSTLY_F16
    params.allow_requantize = True
    params.nthread = default_threads()
    with bindings.library_log.errors() as reasons:
        failed = int(lib.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)))
    if failed:
        target.unlink(missing_ok=True)
        raise ModelError(f"{source} cannot be written as f16: {reasons[0] if reasons else 'the library gave no reason'}")
