"""What every command prints with: one console for results (stdout), one for people (stderr), and how errors end the process."""

from __future__ import annotations

import json
from collections.abc import Mapping

from rich.console import Console

from pasture.core.errors import ConfigError, PastureError

FAILURE = 1
USAGE = 2


def out() -> Console:
    """Results."""
    return Console()


def err() -> Console:
    """Everything that is not the result: progress, banners, errors."""
    return Console(stderr=True)


def print_json(value: Mapping[str, object]) -> None:
    """One JSON document on stdout, nothing else."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def report(error: PastureError) -> int:
    """Say what went wrong in one clear line and return the exit code: 2 for a setting, 1 for anything else."""
    for line in str(error).splitlines() or [type(error).__name__]:
        err().print(f"pasture: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
    return USAGE if isinstance(error, ConfigError) else FAILURE
