"""Sizes and durations as people write them: `2GiB`, `512 MB`, `200ms`, `1.5s`, `2m`.

Binary units are powers of 1024 (KiB, MiB, GiB, TiB), decimal ones powers of 1000 (kB, MB, GB, TB). A bare letter (`2G`) is
refused, because people mean both by it. Pure functions; a text that cannot be read raises ValueError with a sentence that
says what can.
"""

from __future__ import annotations

import re

_BYTES = {
    "": 1,
    "B": 1,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_SECONDS = {"": 1.0, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str | int | float) -> int:
    """Bytes of a size such as `2GiB`; a plain number is bytes."""
    number, unit = _split(text, "a size such as 2GiB, 512MiB or 2GB")
    factor = _BYTES.get(unit.upper())
    if factor is None:
        letter = unit[:1].upper()
        hint = f"write {text}iB or {text}B" if len(unit) == 1 and letter in "KMGT" else "units are KiB MiB GiB TiB kB MB GB TB"
        raise ValueError(f"{text!r} is not a size: {hint}")
    return int(number * factor)


def format_bytes(n_bytes: int) -> str:
    """The size in the largest binary unit that leaves at least one: `2 GiB`, `46.1 MiB`, `512 B`."""
    value = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"


def parse_seconds(text: str | int | float) -> float:
    """Seconds of a duration such as `200ms`; a plain number is seconds."""
    number, unit = _split(text, "a duration such as 200ms, 1.5s or 2m")
    factor = _SECONDS.get(unit.lower())
    if factor is None:
        raise ValueError(f"{text!r} is not a duration: units are us ms s m h")
    return number * factor


def format_seconds(seconds: float) -> str:
    """The duration in the unit a person would use: `200 ms`, `1.5 s`, `2 m`."""
    if seconds < 1:
        return f"{seconds * 1e3:.4g} ms"
    if seconds < 120:
        return f"{seconds:.4g} s"
    if seconds < 7200:
        return f"{seconds / 60:.4g} m"
    return f"{seconds / 3600:.4g} h"


def _split(text: str | int | float, example: str) -> tuple[float, str]:
    match = _QUANTITY.fullmatch(str(text)) if not isinstance(text, bool) else None
    if match is None:
        raise ValueError(f"{text!r} is not {example}")
    return float(match[1]), match[2]
