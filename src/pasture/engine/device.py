"""Where the live cache will lie, and what is free there: in the machine's memory, or in a GPU's own.

A GPU is asked in a child process, because asking makes a context on it: a driver that fails ends whoever does. Its devices
are those with memory of their own; an integrated GPU, and a Mac's, has the machine's. With all layers there, the weights and
all of the cache are as well, divided in the proportions of `tensor_split`, or of what is free. With a part of the layers there,
a part of the cache stays with the others, and the machine's memory counts.

`python -m pasture.engine.device` is the child: one JSON line on stdout, the free bytes of each device.
"""

from __future__ import annotations

import ctypes
import json
import logging
import subprocess
import sys
from collections.abc import Sequence

from pasture.core.values import ModelInfo
from pasture.engine.memory import MemoryPlan, plan_memory, plan_on_device
from pasture.engine.settings import EngineSettings

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 60.0
_GPU = 1
"""ggml's number of devices with memory of their own"""


def plan_pool(info: ModelInfo, settings: EngineSettings, *, n_embd: int) -> MemoryPlan | None:
    """What `settings` will need where the pool will lie; None on a GPU that does not say what is free there."""
    host = plan_memory(info, settings, n_embd=n_embd)
    if settings.n_gpu_layers == 0 or sys.platform == "darwin" or not has_gpu():
        return host
    if 0 <= settings.n_gpu_layers <= info.n_layers:  # the output counts as a layer
        logger.warning(
            "%d of %d layers go to the GPU: the cache is sized by the machine's memory, -c or --kv-memory size it better",
            *(settings.n_gpu_layers, info.n_layers + 1),
        )
        return host
    free = free_bytes()
    if free is None:
        return None
    return plan_on_device(info, settings, n_embd=n_embd, available=usable(free, settings.tensor_split)) if free else host


def has_gpu() -> bool:
    """Whether the library was built for one, and it is there."""
    from pasture.engine.bindings import initialise, lib

    initialise()
    return bool(lib.llama_supports_gpu_offload())


def usable(free: Sequence[int], split: Sequence[float]) -> int:
    """Bytes of what can be divided so over devices with so much free; without a `split`, all of it."""
    shares = [share for share, _ in zip(split, free, strict=False)]
    if not any(shares):
        return sum(free)
    return min(int(n_bytes * sum(shares) / share) for share, n_bytes in zip(shares, free, strict=False) if share)


def free_bytes() -> list[int] | None:
    """Of each GPU with memory of its own; None when there is no answer."""
    command = [sys.executable, "-m", "pasture.engine.device"]
    try:
        child = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=ANSWER_SECONDS, check=False)
        answer = json.loads(child.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        logger.info("the GPU does not say how much memory is free: %s", error)
        return None
    return [int(n_bytes) for n_bytes in answer]


# The child


def _child() -> list[int]:
    from pasture.engine import bindings

    bindings.initialise()
    count, get = bindings.ggml_function("ggml_backend_dev_count"), bindings.ggml_function("ggml_backend_dev_get")
    kind, memory = bindings.ggml_function("ggml_backend_dev_type"), bindings.ggml_function("ggml_backend_dev_memory")
    if count is None or get is None or kind is None or memory is None:
        raise SystemExit("this build of llama.cpp does not export ggml's devices")
    count.restype, get.restype, kind.restype, memory.restype = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int, None
    found = []
    for number in range(count()):
        device = ctypes.c_void_p(get(ctypes.c_size_t(number)))
        if kind(device) == _GPU:
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            memory(device, ctypes.byref(free), ctypes.byref(total))
            found.append(free.value)
    return found


if __name__ == "__main__":
    print(json.dumps(_child()))
