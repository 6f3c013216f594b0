"""Computing in a child process, where a crash does no harm and no memory stays behind.

`run` starts `python -m MODULE`, hands it engine settings as JSON on stdin and gets one JSON line back; `serve` is what such a
module calls.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pasture.core.errors import ModelError, PastureError
from pasture.core.values import Layout, Weights
from pasture.engine.settings import EngineSettings

BASE_TIMEOUT_SECONDS = 60.0
_SLOWEST_BYTES_PER_SECOND = 50e6
_LASTING = {getattr(signal, name, None) for name in ("SIGILL", "SIGSEGV", "SIGBUS")} - {None}
"""what ends a child whose processor does not carry out what it announces; an abort or a kill may have had a passing reason"""

Answer = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Death:
    """How a child ended that did not answer."""

    reason: str
    lasting: bool = False
    """whether it would die so again"""


def run(module: str, settings: EngineSettings, file_bytes: int) -> Answer | Death:
    """Have a child that loads `file_bytes` compute with these settings.

    Raises ModelError when the model itself cannot be loaded, TimeoutExpired (with the child gone) when no answer comes.
    """
    child = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(asdict(settings)),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=BASE_TIMEOUT_SECONDS + file_bytes / _SLOWEST_BYTES_PER_SECOND,
        check=False,
    )
    if child.returncode < 0:
        number = -child.returncode
        return Death(f"a trial run was killed by {_signal_name(number)}", lasting=number in _LASTING)
    try:
        answer: Answer = json.loads(child.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return Death(f"a trial run ended with status {child.returncode}")
    if "error" in answer:
        raise ModelError(str(answer["error"]))
    return answer


def serve(compute: Callable[[EngineSettings], Answer]) -> None:
    """Be the child: settings from stdin, mapped, in small batches and without an annex; one line of JSON to stdout."""
    asked = json.loads(sys.stdin.read())
    enums = {"layout": Layout(asked["layout"]), "weights": Weights(asked["weights"])}
    settings = EngineSettings(**(asked | enums | {"tensor_split": tuple(asked["tensor_split"])}))
    try:
        answer = compute(replace(settings, annex_cells=0, n_batch=256, use_mmap=True, use_mlock=False))
    except PastureError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


def file_bytes(settings: EngineSettings) -> int:
    """Of the model file as it is."""
    return os.path.getsize(settings.model_path)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
