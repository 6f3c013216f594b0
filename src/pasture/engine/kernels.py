"""KV rows from one ggml type to another, with ggml's own kernels.

Owns a table of which C function reads and writes which type: the CPU backend's vectorised ones where the library exports
them, else ggml's portable ones. Everything goes through float32 in pieces that stay in the processor's cache. ctypes releases
the interpreter lock while a kernel runs, and long runs are split over threads, so this is safe and quick from any thread.

One type is ours: q4_0 of values that were rotated, 64 at a time, by a Hadamard matrix. Keys have a few channels far larger
than the rest, and one of them makes the steps of its whole block of 32 coarse; rotated, it is spread over 64. Measured on
SmolLM2, q4_0 then moves the model's answers less than half as far, in the same bytes. Idea: QuaRot (Ashkboos et al., 2024);
llama.cpp does the same to live caches that are quantised from the start.

Knows types by ggml's numbers and flat buffers of them; nothing of caches or blocks. A type it has no kernel for is one that
cannot be converted, never a crash.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pasture.core.errors import EngineError
from pasture.core.storage import Bytes
from pasture.engine import bindings
from pasture.engine.bindings import KV_TYPES
from pasture.engine.settings import default_threads

F32, Q8_0, Q4_0 = (KV_TYPES[name] for name in ("f32", "q8_0", "q4_0"))

ROTATED_Q4_0 = 0x100 | Q4_0
_ROTATED_ELEMENTS = 64

_PIECE_ELEMENTS = 1 << 15
"""128 KiB as float32; a multiple of every type's block"""
_THREAD_ELEMENTS = 1 << 20
"""what is worth a thread of its own"""

_READERS = {
    "f16": ("ggml_cpu_fp16_to_fp32", "ggml_fp16_to_fp32_row"),
    "bf16": ("ggml_cpu_bf16_to_fp32", "ggml_bf16_to_fp32_row"),
}
_WRITERS = {
    "f16": ("ggml_cpu_fp32_to_fp16", "ggml_fp32_to_fp16_row"),
    "bf16": ("ggml_cpu_fp32_to_bf16", "ggml_fp32_to_bf16_row"),
}


@dataclass(frozen=True, slots=True)
class Kernel:
    """One type's block, and how it becomes float32 and back; None for a direction without a function."""

    block_elements: int
    block_bytes: int
    read: Any | None
    """f(source, float32 target, count)"""
    write: Any | None
    """f(float32 source, target, count)"""
    is_float32: bool = False
    """needs neither function"""
    is_rotated: bool = False

    def row_bytes(self, elements: int) -> int | None:
        """None where a row of so many elements has no whole number of blocks."""
        blocks, rest = divmod(elements, self.block_elements)
        return None if rest else blocks * self.block_bytes

    def elements(self, row_bytes: int) -> int | None:
        blocks, rest = divmod(row_bytes, self.block_bytes)
        return None if rest else blocks * self.block_elements


@cache
def kernel(ggml_type: int) -> Kernel | None:
    """None for a type that is no KV type."""
    if ggml_type == ROTATED_Q4_0:
        plain = kernel(Q4_0)
        groups = _ROTATED_ELEMENTS // plain.block_elements if plain is not None else 0
        return plain and replace(
            plain, block_elements=_ROTATED_ELEMENTS, block_bytes=groups * plain.block_bytes, is_rotated=True
        )
    name = next((name for name, number in KV_TYPES.items() if number == ggml_type), None)
    if name is None:
        return None
    bindings.initialise()
    prepare = bindings.ggml_function("ggml_cpu_init")
    if prepare is not None:
        prepare()
    (block_elements, block_bytes) = _block_of(ggml_type)
    if name == "f32":
        return Kernel(block_elements, block_bytes, None, None, is_float32=True)
    return Kernel(
        block_elements,
        block_bytes,
        bindings.ggml_function(*_READERS.get(name, (f"dequantize_row_{name}",))),
        bindings.ggml_function(*_WRITERS.get(name, (f"quantize_row_{name}", f"quantize_row_{name}_ref"))),
    )


def _block_of(ggml_type: int) -> tuple[int, int]:
    elements, size = bindings.ggml_function("ggml_blck_size"), bindings.ggml_function("ggml_type_size")
    if elements is None or size is None:
        raise EngineError("the llama.cpp library does not export ggml's type sizes")
    elements.restype, size.restype = ctypes.c_int64, ctypes.c_size_t
    return int(elements(ctypes.c_int(ggml_type))), int(size(ctypes.c_int(ggml_type)))


def can_convert(source_type: int, target_type: int) -> bool:
    """Whether `convert` knows the way."""
    if source_type == target_type:
        return True
    source, target = kernel(source_type), kernel(target_type)
    if source is None or target is None:
        return False
    return (source.is_float32 or source.read is not None) and (target.is_float32 or target.write is not None)


def convert(source: Bytes, source_type: int, target: Bytes, target_type: int) -> None:
    """Write `source`, a flat run of whole blocks, into `target`, which has exactly the room for it.

    Raises EngineError where the sizes do not belong together or the way is not known.
    """
    if source_type == target_type and source.nbytes == target.nbytes:
        target[...] = source
        return
    reader, writer = kernel(source_type), kernel(target_type)
    if reader is None or writer is None or not can_convert(source_type, target_type):
        raise EngineError(f"no way from KV type {source_type} to {target_type}")
    elements = reader.elements(source.nbytes)
    if elements is None or writer.elements(target.nbytes) != elements:
        raise EngineError(f"{source.nbytes} bytes of KV type {source_type} are not {target.nbytes} of {target_type}")
    n_threads = min(default_threads(), elements // _THREAD_ELEMENTS)
    if n_threads < 2:
        _convert_run(source, reader, target, writer)
        return
    share = -(-elements // n_threads // _PIECE_ELEMENTS) * _PIECE_ELEMENTS
    with ThreadPoolExecutor(n_threads) as pool:
        parts = [(slice(start, min(start + share, elements))) for start in range(0, elements, share)]
        for future in [
            pool.submit(_convert_run, _cut(source, reader, part), reader, _cut(target, writer, part), writer) for part in parts
        ]:
            future.result()


def _cut(data: Bytes, kind: Kernel, part: slice) -> Bytes:
    scale = kind.block_bytes, kind.block_elements
    return data[part.start * scale[0] // scale[1] : part.stop * scale[0] // scale[1]]


def _convert_run(source: Bytes, reader: Kernel, target: Bytes, writer: Kernel) -> None:
    elements = reader.elements(source.nbytes) or 0
    scratch = np.empty((2, min(elements, _PIECE_ELEMENTS)), np.float32)
    for start in range(0, elements, _PIECE_ELEMENTS):
        part = slice(start, min(start + _PIECE_ELEMENTS, elements))
        here, there = _cut(source, reader, part), _cut(target, writer, part)
        floats, spare = scratch[:, : part.stop - part.start]
        if reader.read is None:
            floats.view(np.uint8)[...] = here
        else:
            reader.read(_at(here), _at(floats), ctypes.c_int64(len(floats)))
        if reader.is_rotated != writer.is_rotated:
            _rotate(floats, spare)
            floats = spare
        if writer.write is None:
            there[...] = floats.view(np.uint8)
        else:
            writer.write(_at(floats), _at(there), ctypes.c_int64(len(floats)))


def _at(array: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@cache
def _hadamard() -> NDArray[np.float32]:
    """The orthonormal Walsh-Hadamard matrix, which is its own inverse."""
    matrix: NDArray[np.float32] = np.ones((1, 1), np.float32)
    while len(matrix) < _ROTATED_ELEMENTS:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix /= np.float32(np.sqrt(_ROTATED_ELEMENTS))
    return matrix


def _rotate(floats: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Squares of 64 groups at a time: a product so small that the linear algebra library starts no threads for it."""
    square = _ROTATED_ELEMENTS * _ROTATED_ELEMENTS
    whole = len(floats) // square * square
    shape = (-1, _ROTATED_ELEMENTS, _ROTATED_ELEMENTS)
    np.matmul(floats[:whole].reshape(shape), _hadamard(), out=out[:whole].reshape(shape))
    rest = (-1, _ROTATED_ELEMENTS)
    np.matmul(floats[whole:].reshape(rest), _hadamard(), out=out[whole:].reshape(rest))
