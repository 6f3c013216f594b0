"""What every command prints with: one console for results (stdout), one for people (stderr), and how errors end the process."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console

from pasture.cli.logs import JsonLines
from pasture.core.errors import ConfigError, PastureError
from pasture.core.values import ModelInfo, Weights

FAILURE = 1
USAGE = 2
FILE_CHARACTERS = 140


def out() -> Console:
    """Results. A file or a pipe is wide enough for every table, unless COLUMNS says how wide it is."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=FILE_CHARACTERS)


def err() -> Console:
    """Everything that is not the result: progress, banners, errors."""
    return Console(stderr=True)


def set_up_logging(level: str, form: str = "text") -> None:
    """Log to stderr, pasture's own loggers at `level`; llama.cpp's lines only when they warn, or all of them at debug.

    `form`: text for people, or json, which has a line for each answered request too.
    """
    handler = logging.StreamHandler()
    as_text = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    handler.setFormatter(JsonLines() if form == "json" else as_text)
    logging.basicConfig(level=level.upper(), handlers=[handler])
    if level != "debug":
        logging.getLogger("pasture.llama").setLevel(logging.WARNING)
        logging.getLogger("pasture.requests").setLevel(logging.INFO if form == "json" else logging.WARNING)


class _Remarks(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


@contextmanager
def remarks() -> Iterator[list[str]]:
    """What the self-check has to say while the block runs, kept for the reader instead of going to the log."""
    logger = logging.getLogger("pasture.engine.selfcheck")
    handler = _Remarks()
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield handler.found
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated


def weights(model: ModelInfo) -> str:
    """With which weights a loaded model computes, and why, as rich markup."""
    how = "as they are in the file" if model.weights is Weights.FILE else f"written out as {model.weights}"
    return f"{how} [dim]({model.weights_because})[/]" if model.weights_because else how


def print_json(value: Mapping[str, object]) -> None:
    """One JSON document on stdout, nothing else."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def report(error: PastureError) -> int:
    """Say what went wrong in one clear line and return the exit code: 2 for a setting, 1 for anything else."""
    for line in str(error).splitlines() or [type(error).__name__]:
        err().print(f"pasture: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
    return USAGE if isinstance(error, ConfigError) else FAILURE
