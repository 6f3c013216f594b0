"""Whether the machine is short of memory: what of this process was swapped out, what is left, how long tasks waited for memory.

Owns the reading (Linux: `/proc`; elsewhere what psutil knows) and the limits from which on it is trouble. A model or cache that
is swapped out is read back at a thousandth of its speed, in the middle of somebody's reply. Any thread; a few file reads.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import psutil

MIB = 1 << 20
SWAPPED_BYTES = 64 * MIB
"""so much of the process swapped out is no accident"""
AVAILABLE_BYTES = 128 * MIB
STALLED_PERCENT = 5.0
"""of the last minute in which every task waited for memory"""

_STATUS = Path("/proc/self/status")
_PRESSURE = Path("/proc/pressure/memory")


@dataclass(frozen=True, slots=True)
class Memory:
    """The machine's and the process's, now."""

    swapped_bytes: int
    """of this process"""
    available_bytes: int
    """that the machine could give without swapping"""
    stalled_percent: float | None
    """None where the system does not tell"""


def read_memory() -> Memory:
    """How it is now."""
    swapped = re.search(r"^VmSwap:\s+(\d+) kB", _text(_STATUS), re.MULTILINE)
    stalled = re.search(r"^full .*avg60=([\d.]+)", _text(_PRESSURE), re.MULTILINE)
    return Memory(
        int(swapped[1]) * 1024 if swapped else 0,
        int(psutil.virtual_memory().available),
        float(stalled[1]) if stalled else None,
    )


def trouble(memory: Memory) -> str | None:
    """What is wrong, as a sentence's beginning; None where nothing is."""
    if memory.swapped_bytes >= SWAPPED_BYTES:
        return f"{memory.swapped_bytes // MIB:,} MiB of the server are swapped out"
    if memory.available_bytes < AVAILABLE_BYTES:
        return f"the machine has {memory.available_bytes // MIB} MiB of memory left"
    if memory.stalled_percent is not None and memory.stalled_percent >= STALLED_PERCENT:
        return f"everything on the machine waited for memory in {memory.stalled_percent:.0f} % of the last minute"
    return None


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
