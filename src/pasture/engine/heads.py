"""Whether this build of llama.cpp is slow at attention over heads of this model's size, and what to do about it.

Built for a processor with AVX512-FP16 (Xeons since 2023), ggml adds rows of V as halves, 128 numbers at a time, and what is
left of a row number by number. A head of 64 numbers is all rest: a decode step of SmolLM2 with 16 conversations of 1,000
tokens then takes twice as long as in a build without those instructions.

Nothing in the library tells how it was built. So one small attention is timed over heads of 64 and over heads of 128 numbers,
which are twice the work and ought to take longer. Runs on the calling thread and on the CPU, in a few milliseconds.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

from pasture.engine import bindings
from pasture.engine.bindings import KV_TYPES

_VECTOR_ELEMENTS = 128
_CELLS = 1024
_HEADS = 8
_RUNS = 7
_ARENA_BYTES = 16 << 20

REBUILD = (
    'CMAKE_ARGS="-DCMAKE_C_FLAGS=-mno-avx512fp16 -DCMAKE_CXX_FLAGS=-mno-avx512fp16" '
    "pip install --force-reinstall --no-deps --no-cache-dir --no-binary llama-cpp-python "
    f"llama-cpp-python=={bindings.VERSION}"
)
"""what a user types against it"""


class _InitParams(ctypes.Structure):
    """ggml_init_params"""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def slow_heads(head_elements: int) -> str:
    """A sentence on what is slow and what to do; empty where heads of this size are computed as they should be."""
    if head_elements % _VECTOR_ELEMENTS == 0:
        return ""
    half, whole = attention_seconds(_VECTOR_ELEMENTS // 2), attention_seconds(_VECTOR_ELEMENTS)
    if half is None or whole is None or half <= whole:
        return ""
    return (
        f"this build of llama.cpp computes attention over heads of {head_elements} numbers number by number (64 take "
        f"{half / whole:.1f} times as long as 128); rebuilt without AVX512-FP16 it generates faster: {REBUILD}"
    )


def attention_seconds(head_elements: int) -> float | None:
    """The quickest of a few runs of one query over 1,024 cells of f16, 8 heads. None where ggml cannot be called."""
    names = ("init", "free", "new_tensor_3d", "set_zero", "flash_attn_ext", "new_graph", "build_forward_expand")
    calls = {name: bindings.ggml_function(f"ggml_{name}") for name in (*names, "graph_compute_with_ctx")}
    if None in calls.values():
        return None
    bindings.initialise()
    pointer, size, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    init: Any = calls["init"]
    init.restype, init.argtypes = pointer, [_InitParams]
    arena = init(_InitParams(_ARENA_BYTES, None, False))
    if not arena:
        return None

    def call(name: str, *arguments: Any) -> int:
        function: Any = calls[name]
        function.restype = pointer
        return int(function(*arguments) or 0)

    def zeros(kind: str, *shape: int) -> Any:
        tensor = call("new_tensor_3d", pointer(arena), KV_TYPES[kind], *map(size, shape))
        call("set_zero", pointer(tensor))
        return pointer(tensor)

    try:
        query = zeros("f32", head_elements, 1, _HEADS)
        keys, values = (zeros("f16", head_elements, _CELLS, _HEADS) for _ in range(2))
        answer = call("flash_attn_ext", pointer(arena), query, keys, values, None, real(1.0), real(0.0), real(0.0))
        graph = call("new_graph", pointer(arena))
        call("build_forward_expand", pointer(graph), pointer(answer))
        times = []
        for _ in range(_RUNS):
            began = time.perf_counter()
            call("graph_compute_with_ctx", pointer(arena), pointer(graph), 1)
            times.append(time.perf_counter() - began)
        return min(times)
    finally:
        call("free", pointer(arena))
