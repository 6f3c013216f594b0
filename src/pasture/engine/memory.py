"""Whether a model and its pool fit into the memory that is free, and how many cells would.

An estimate made before anything is allocated: llama.cpp would otherwise be killed by the kernel while it clears its buffers,
without a word. Counted: the KV cells and the annex, the logits buffer, the attention mask and the activations of one
micro-batch, and the weights where they are read rather than mapped, which on a GPU they always are. The free memory of the
machine is the smaller of what it and what the process's control groups still have; `device` knows a GPU's, whose own allocator
has the last word. Stateless.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from pasture.core.errors import DoesNotFit
from pasture.core.values import ModelInfo
from pasture.engine import control_groups
from pasture.engine.settings import CELL_PADDING, EngineSettings

MIB = 1 << 20
SPARE_BYTES = 64 * MIB
_MASK_BYTES = 6
"""a cell and a micro-batch row: the mask in f32 and in f16"""
_DEVICE_SPARE_BYTES = 512 * MIB
"""of a GPU's: its libraries' workspaces, and what else is on it"""
_ACTIVATION_ROWS = 24
"""micro-batch rows of one embedding's width alive at once, generously"""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes a start will need, on the host or on a GPU."""

    cell_bytes: int
    """a cell: KV and mask"""
    fixed_bytes: int
    available_bytes: int

    @property
    def largest_cells(self) -> int:
        """Cells that fit, rounded down to the padding."""
        free = self.available_bytes - self.fixed_bytes
        return max(0, free // max(1, self.cell_bytes)) // CELL_PADDING * CELL_PADDING

    def needed_bytes(self, n_cells: int) -> int:
        return self.fixed_bytes + n_cells * self.cell_bytes


def available_bytes() -> int:
    """Memory this process can still take without swapping: the machine's, or its control groups' if less."""
    available = int(psutil.virtual_memory().available)
    in_groups = control_groups.bytes_left()
    return available if in_groups is None else min(available, in_groups)


def plan_memory(info: ModelInfo, settings: EngineSettings, *, n_embd: int, available: int | None = None) -> MemoryPlan:
    """What `settings` will need for this model."""
    rows = min(settings.n_ubatch, settings.n_batch)
    logits = 2 * settings.n_seqs * info.n_vocab * 4
    activations = rows * n_embd * _ACTIVATION_ROWS * 4
    cell_bytes = info.cell_bytes + rows * _MASK_BYTES
    annex = settings.annex_cells * cell_bytes + activations if settings.annex_cells else 0
    weights = 0 if settings.use_mmap and not settings.use_mlock else _weights_bytes(info, settings)
    return MemoryPlan(
        cell_bytes=cell_bytes,
        fixed_bytes=weights + logits + activations + annex + SPARE_BYTES,
        available_bytes=available_bytes() if available is None else available,
    )


def plan_on_device(info: ModelInfo, settings: EngineSettings, *, n_embd: int, available: int) -> MemoryPlan:
    """What `settings` will need on GPUs that hold all of the model, and have so many bytes free together."""
    rows = min(settings.n_ubatch, settings.n_batch)
    computing = rows * (n_embd * _ACTIVATION_ROWS + info.n_vocab) * 4
    return MemoryPlan(
        cell_bytes=info.cell_bytes + rows * _MASK_BYTES,
        fixed_bytes=_weights_bytes(info, settings) + computing + _DEVICE_SPARE_BYTES,
        available_bytes=available,
    )


def _weights_bytes(info: ModelInfo, settings: EngineSettings) -> int:
    return max(2 * info.n_params, info.n_bytes) if settings.weights.is_copy else info.n_bytes


def check_fits(plan: MemoryPlan, n_cells: int) -> None:
    """Raises DoesNotFit, naming the largest number of cells that fits."""
    needed = plan.needed_bytes(n_cells)
    if needed <= plan.available_bytes:
        return
    largest = plan.largest_cells
    advice = f"the largest that fits is {largest} cells" if largest else "not even the smallest fits"
    raise DoesNotFit(
        f"{n_cells} cells need about {needed / MIB:.0f} MiB and {plan.available_bytes / MIB:.0f} MiB are free: {advice}"
    )
