"""One `llama_context`: the live cache, the batch that feeds it, and the sequence operations on its cells.

Owns the C context and the batch arrays. The batch is numpy memory that the C struct points into, so filling it is slice
assignment. Knows layouts and two kinds of hidden sequence ids; knows nothing of plans, samplers or slabs.

Hidden ids in the unified layout, behind the caller's `[0, n_seqs)`:

    [0, n_seqs)            the caller's
    [n_seqs, 2 * n_seqs)   guards, only for sliding-window models
    last but one           left: cells that a compaction left, kept from being filled again
    last                   scratch, through which a part of a sequence is saved or restored

A sliding-window cache hands out cells that lie behind the window of their *only* holder, even when free ones are left.
A prefix that is shared later would then miss rows and give a wrong answer. So each sequence has a guard that holds the same
cells: a cell of two holders is never handed out. The streams layout needs no guards (a stream is one sequence, filled from
the front) and no scratch (whole sequences are rewritten).

Thread: one, the engine's.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pasture.core.errors import DoesNotFit, EngineError, ModelError
from pasture.core.values import Form, Layout, PoolShape
from pasture.engine import bindings
from pasture.engine.bindings import KV_TYPES, MAX_SEQUENCES, Brake, lib
from pasture.engine.model import Model
from pasture.engine.settings import CELL_PADDING, EngineSettings, default_threads

CPU_TILE_TOKENS = 64
"""ggml's GGML_FA_TILE_Q: with fewer query rows each row walks over the cells alone"""
_FULL_STATE = 0
WINDOW_STATE_ONLY = 1
"""LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY: of a sliding-window model, the window's cache alone"""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of one sequence within one batch."""

    sequence: int
    tokens: Sequence[int]
    start: int
    wants_logits: bool
    n_pads: int = 0
    """further tokens at the positions behind, removed again after the decode"""


def plan_shape(settings: EngineSettings, layout: Layout, n_seqs: int, form: Form, *, n_hidden: int) -> PoolShape:
    """The shape that `n_cells` really gives: rounded down to llama.cpp's padding (up only to the first 256)."""
    if layout is Layout.UNIFIED:
        n_cells = max(CELL_PADDING, settings.n_cells // CELL_PADDING * CELL_PADDING)
    else:
        per_sequence = settings.n_cells // n_seqs // CELL_PADDING * CELL_PADDING
        if not per_sequence:
            raise DoesNotFit(
                f"{settings.n_cells} cells in {n_seqs} streams leave fewer than {CELL_PADDING} each; "
                f"ask for {n_seqs * CELL_PADDING} cells or fewer sequences"
            )
        n_cells = per_sequence * n_seqs
    if n_seqs + n_hidden > MAX_SEQUENCES:
        raise DoesNotFit(f"{n_seqs} sequences are too many: llama.cpp has {MAX_SEQUENCES} ids, {n_hidden} of them are ours")
    n_batch = min(settings.n_batch, n_cells)
    return PoolShape(n_cells=n_cells, n_seqs=n_seqs, layout=layout, n_batch=n_batch, form=form)


def on_host(settings: EngineSettings) -> bool:
    """Whether the whole cache is in the host's memory."""
    return settings.n_gpu_layers == 0 or not bool(lib.llama_supports_gpu_offload())


def _tiles_on_cpu(settings: EngineSettings) -> bool:
    """Whether attention runs on the CPU in types that its tiled kernel takes (ggml-cpu/ops.cpp, flash_attn_ext)."""
    return (
        on_host(settings) and settings.flash_attn and settings.type_k == settings.type_v and settings.type_k in ("f16", "f32")
    )


def max_sequences(model: Model, layout: Layout) -> int:
    """How many sequences a context of this layout can offer."""
    if layout is Layout.STREAMS or not model.info.shareable:
        return MAX_SEQUENCES
    return (MAX_SEQUENCES - 2) // (2 if model.window_tokens else 1)


class Context:
    """A live cache of a given shape. `close` frees it; it must go before its model does."""

    def __init__(self, model: Model, settings: EngineSettings, layout: Layout, n_seqs: int, form: Form = Form.RAW) -> None:
        """`settings` hold the KV types to use; a `form` other than RAW says that they are not the configured ones.

        Such a cache is made without the library's rotation of quantised rows, so that what was computed before fits in.
        """
        self.is_guarded = layout is Layout.UNIFIED and model.info.shareable and model.window_tokens > 0
        has_scratch = layout is Layout.UNIFIED and model.info.shareable
        n_hidden = (n_seqs if self.is_guarded else 0) + (2 if has_scratch else 0)
        self.shape = plan_shape(settings, layout, n_seqs, form, n_hidden=n_hidden)
        self.n_streams = 1 if layout is Layout.UNIFIED else n_seqs
        self.scratch = n_seqs + n_hidden - 1 if has_scratch else None
        self.left = n_seqs + n_hidden - 2 if has_scratch else None
        tiles = _tiles_on_cpu(settings)
        can_pad = tiles and model.info.shareable and model.window_tokens == 0
        self.shape = replace(self.shape, tile_tokens=CPU_TILE_TOKENS if tiles else 1, can_pad=can_pad)
        self._n_vocab = model.vocabulary.n_tokens
        rotation = nullcontext() if form is Form.RAW else bindings.without_rotation()
        with bindings.library_log.errors() as reasons, rotation:
            params = self._params(settings, n_seqs + n_hidden)
            self._handle = lib.llama_init_from_model(model.handle, params)
            if not self._handle:
                raise _refusal(self.shape, list(reasons))
        self._memory = lib.llama_get_memory(self._handle)
        self._closed = False
        real = int(lib.llama_n_ctx(self._handle)), int(lib.llama_n_batch(self._handle))
        if real != (self.shape.n_cells, self.shape.n_batch):
            self.close()
            raise EngineError(f"asked for {self.shape}, llama.cpp made (cells, batch) = {real}")
        self._make_batch()

    def heed(self, brake: Brake) -> None:
        """Decodes end with `bindings.ABORTED` while it is set."""
        brake.watch(self._handle)

    def _params(self, settings: EngineSettings, n_seq_max: int) -> Any:
        params = lib.llama_context_default_params()
        params.n_ctx = self.shape.n_cells
        params.n_batch = self.shape.n_batch
        params.n_ubatch = min(settings.n_ubatch, self.shape.n_batch)
        params.n_seq_max = n_seq_max
        params.n_outputs_max = n_seq_max
        params.n_threads = settings.n_threads or default_threads()
        params.n_threads_batch = settings.n_threads_batch or params.n_threads
        params.flash_attn_type = bindings.FLASH_ATTENTION_ON if settings.flash_attn else bindings.FLASH_ATTENTION_OFF
        params.type_k = KV_TYPES[settings.type_k]
        params.type_v = KV_TYPES[settings.type_v]
        params.kv_unified = self.shape.layout is Layout.UNIFIED
        params.swa_full = True
        params.offload_kqv = True
        params.embeddings = False
        params.no_perf = True
        return params

    def _make_batch(self) -> None:
        n_batch, width = self.shape.n_batch, 2 if self.is_guarded else 1
        self._token: NDArray[np.int32] = np.zeros(n_batch, np.int32)
        self._pos: NDArray[np.int32] = np.zeros(n_batch, np.int32)
        self._seq: NDArray[np.int32] = np.zeros((n_batch, width), np.int32)
        self._wanted: NDArray[np.int8] = np.zeros(n_batch, np.int8)
        self._n_seq: NDArray[np.int32] = np.full(n_batch, width, np.int32)
        row_bytes = self._seq.strides[0]
        self._seq_pointers = self._seq.ctypes.data + np.arange(n_batch, dtype=np.uint64) * np.uint64(row_bytes)
        batch = lib.llama_batch()
        for name, array in (
            ("token", self._token),
            ("pos", self._pos),
            ("n_seq_id", self._n_seq),
            ("seq_id", self._seq_pointers),
            ("logits", self._wanted),
        ):
            pointer = type(getattr(batch, name))
            setattr(batch, name, ctypes.cast(array.ctypes.data, pointer))
        self._batch = batch

    # Decoding

    def decode(self, pieces: Sequence[Piece], pad_to: int = 0) -> tuple[int, float]:
        """Run one batch of at most `shape.n_batch` tokens: llama_decode's return code and the seconds inside it.

        With fewer than `pad_to` tokens the scratch sequence fills the batch, and is emptied again: its rows see only
        themselves, and nobody sees them.
        """
        end = 0
        padded = [piece for piece in pieces if piece.n_pads]
        for piece in pieces:
            begin, end = end, end + len(piece.tokens)
            self._wanted[begin:end] = 0
            if end - begin == 1:
                self._token[begin] = piece.tokens[0]
                self._pos[begin] = piece.start
            else:
                self._token[begin:end] = piece.tokens
                self._pos[begin:end] = np.arange(piece.start, piece.start + end - begin)
            self._seq[begin:end, 0] = piece.sequence
            if self.is_guarded:
                self._seq[begin:end, 1] = self._guard(piece.sequence)
            if piece.wants_logits:
                self._wanted[end - 1] = 1
            if piece.n_pads:
                self._pad(piece.sequence, piece.start + end - begin, end, end + piece.n_pads)
                end += piece.n_pads
        pads = self.scratch if end < pad_to else None
        if pads is not None:
            self._pad(pads, 0, end, pad_to)
        self._batch.n_tokens = end if pads is None else pad_to
        began = time.perf_counter()
        code = int(lib.llama_decode(self._handle, self._batch))
        lib.llama_synchronize(self._handle)
        seconds = time.perf_counter() - began
        if pads is not None:
            self.remove(pads)
        for piece in padded:
            self.remove(piece.sequence, piece.start + len(piece.tokens))
        return code, seconds

    def _pad(self, sequence: int, position: int, begin: int, end: int) -> None:
        self._token[begin:end] = 0
        self._pos[begin:end] = np.arange(position, position + end - begin)
        self._seq[begin:end, 0] = sequence
        self._wanted[begin:end] = 0

    def logits(self, n_rows: int) -> NDArray[np.float32]:
        """The wanted rows of the last decode in batch order, `(n_rows, n_vocab) float32`, valid until the next decode."""
        if not n_rows:
            return np.empty((0, self._n_vocab), np.float32)
        return np.ctypeslib.as_array(lib.llama_get_logits(self._handle), (n_rows, self._n_vocab))

    # Sequences

    def length(self, sequence: int) -> int:
        """Position after the sequence's last cell."""
        return int(lib.llama_memory_seq_pos_max(self._memory, sequence)) + 1

    def remove(self, sequence: int, p0: int = 0, p1: int | None = None) -> bool:
        """The sequence leaves `[p0, p1)`. False: a running state cannot be cut there, nothing was changed."""
        end = -1 if p1 is None else p1
        done = bool(lib.llama_memory_seq_rm(self._memory, sequence, p0, end))
        if self.is_guarded and sequence < self.shape.n_seqs:
            lib.llama_memory_seq_rm(self._memory, self._guard(sequence), p0, end)
        return done

    def join(self, source: int, target: int, p0: int, p1: int) -> None:
        """Target joins source's cells in `[p0, p1)`. Unified layout only: across streams the library aborts."""
        if self.shape.layout is not Layout.UNIFIED:
            raise EngineError("cells cannot be joined across streams")
        lib.llama_memory_seq_cp(self._memory, source, target, p0, p1)
        if self.is_guarded and target < self.shape.n_seqs:
            lib.llama_memory_seq_cp(self._memory, source, self._guard(target), p0, p1)

    def copy_state(self, source: int, target: int) -> None:
        """A stateful model's whole sequence, in the unified layout."""
        lib.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def clear(self) -> None:
        """Empty every sequence; buffers keep their bytes."""
        lib.llama_memory_clear(self._memory, False)

    def _guard(self, sequence: int) -> int:
        return self.shape.n_seqs + sequence

    # State blobs

    def read_state(self, sequence: int, *, flags: int = _FULL_STATE) -> NDArray[np.uint8]:
        size = int(lib.llama_state_seq_get_size_ext(self._handle, sequence, flags))
        blob: NDArray[np.uint8] = np.empty(size, np.uint8)
        written = int(lib.llama_state_seq_get_data_ext(self._handle, _bytes_of(blob), size, sequence, flags))
        if written != size or not size:
            raise EngineError(f"sequence {sequence} could not be saved: {written} of {size} bytes were written")
        return blob

    def write_state(self, sequence: int, blob: NDArray[np.uint8]) -> None:
        """Replace the sequence by a checked blob. Raises EngineError, with the sequence empty, when there is no room."""
        self.remove(sequence)
        with bindings.library_log.errors() as reasons:
            read = int(lib.llama_state_seq_set_data_ext(self._handle, _bytes_of(blob), len(blob), sequence, _FULL_STATE))
            if read != len(blob):
                self.remove(sequence)
                raise EngineError(f"sequence {sequence} could not be restored: {reasons[0] if reasons else 'no reason given'}")
        if self.is_guarded and sequence < self.shape.n_seqs:
            lib.llama_memory_seq_cp(self._memory, sequence, self._guard(sequence), -1, -1)

    @property
    def closed(self) -> bool:
        """Nothing but `shape` and `close` may be used then: the library's memory is gone."""
        return self._closed

    def close(self) -> None:
        """Free the context; safe to call twice."""
        if not self._closed:
            self._closed = True
            lib.llama_free(self._handle)


def _refusal(shape: PoolShape, reasons: list[str]) -> ModelError:
    """DoesNotFit where memory was short, ModelError where the settings do not suit the model."""
    why = "; ".join(reasons[:2]) or "the library gave no reason"
    message = f"a cache of {shape.n_cells} cells cannot be made: {why}"
    return DoesNotFit(message) if "alloc" in why or "reserve" in why else ModelError(message)


def _bytes_of(blob: NDArray[np.uint8]) -> Any:
    return ctypes.cast(blob.ctypes.data, ctypes.POINTER(ctypes.c_uint8))
