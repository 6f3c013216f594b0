"""What one engine is asked to be. A frozen value, checked here so that the C library never sees a number it asserts on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from subprocess import SubprocessError, run

from pasture.core.errors import ConfigError
from pasture.core.values import Layout, Weights
from pasture.engine.probe import row_bytes

OnProgress = Callable[[float], None]
"""hears how far something is, 0 to 1"""

CELL_PADDING = 256
"""llama.cpp pads every stream's cells to this"""


def default_threads() -> int:
    """Cores this process may run on; on a Mac, the performance cores."""
    if sys.platform == "darwin":
        return _performance_cores()
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def _performance_cores() -> int:
    """Of a Mac; asked once, since asking takes a process."""
    try:
        answer = run(["sysctl", "-n", "hw.perflevel0.physicalcpu"], capture_output=True, timeout=5, check=True)
        return max(1, int(answer.stdout))
    except (OSError, ValueError, SubprocessError):
        return max(1, (os.cpu_count() or 2) // 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """A model file and the shape of its live cache. Raises ConfigError on values no llama.cpp would take."""

    model_path: str
    n_cells: int = 8192
    n_seqs: int = 64
    layout: Layout = Layout.UNIFIED
    annex_cells: int = 0
    """of a small cache beside the pool in which prompts are computed where attention looks over the whole pool otherwise; it
    is made where that is so (llama.cpp's tiles on a CPU), and 0 is none"""
    n_batch: int = 2048
    n_ubatch: int = 512
    n_gpu_layers: int = -1
    """-1: as many as the build and the device take"""
    n_threads: int | None = None
    """None: `default_threads()`"""
    n_threads_batch: int | None = None
    """None: the same as n_threads"""
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attn: bool = True
    """off: no part of a sequence can be saved, so nothing but whole-sequence swaps is possible"""
    use_mmap: bool = True
    use_mlock: bool = False
    use_extra_bufts: bool | None = None
    """llama.cpp's repacked weight buffers; None: on where the self-check survives them"""
    weights: Weights = Weights.AUTO
    """AUTO without a self-check: as in the file"""
    main_gpu: int = 0
    tensor_split: tuple[float, ...] = ()
    self_check: bool = True
    """try these settings in a child process first"""

    def __post_init__(self) -> None:
        for name in ("n_cells", "n_seqs", "n_batch", "n_ubatch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.annex_cells < 0:
            raise ConfigError(f"an annex of {self.annex_cells} cells")
        for threads in (self.n_threads, self.n_threads_batch):
            if threads is not None and threads < 1:
                raise ConfigError(f"{threads} threads; at least 1 is needed")
        for kv_type in (self.type_k, self.type_v):
            row_bytes(1, kv_type)
        if not self.flash_attn and self.type_v not in ("f16", "f32", "bf16"):
            raise ConfigError(f"a V cache of type {self.type_v} needs flash attention")
