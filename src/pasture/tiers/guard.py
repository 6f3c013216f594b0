"""Keeps the RAM tier from being what makes the kernel kill the process.

Watches what the machine, or the control group, has left. Below a reserve the tier's budget shrinks at once by what is missing,
and by as much again as it takes to be clear of the edge; it widens slowly, and only well above the reserve, so that it does not
swing. The configured budget is never exceeded. Knows only numbers; the callable that supplies them comes from the composition.
Background thread; nothing else touches a guard.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class GuardLimits:
    """Bytes that are to stay free. Between the two the budget stays as it is."""

    reserve_bytes: int = 256 * MIB
    """below it the tier shrinks"""
    comfort_bytes: int = 512 * MIB
    """above it the tier widens again, by half of what is above each time"""


class MemoryGuard:
    """Says how large the RAM tier may be at this moment."""

    def __init__(self, configured_bytes: int, available: Callable[[], int], limits: GuardLimits | None = None) -> None:
        """`available`: bytes that the process could still take without swapping or being killed."""
        self._configured = configured_bytes
        self._available = available
        self._limits = limits or GuardLimits()
        self._budget = configured_bytes

    @property
    def shrunken(self) -> bool:
        return self._budget < self._configured

    def budget(self, used_bytes: int) -> int:
        """The budget from now on, `0..configured`; `used_bytes`: what the tier holds."""
        available = self._available()
        if available < self._limits.reserve_bytes:
            middle = (self._limits.reserve_bytes + self._limits.comfort_bytes) // 2
            self._budget = max(0, min(self._budget, used_bytes - (middle - available)))
        elif self.shrunken and available > self._limits.comfort_bytes:
            more = (available - self._limits.comfort_bytes) // 2
            self._budget = min(self._configured, max(self._budget, used_bytes) + more)
        return self._budget


def give_back_freed_memory() -> None:
    """Ask the C library to return what was freed to the system; where it cannot, nothing happens."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
