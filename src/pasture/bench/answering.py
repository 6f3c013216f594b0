"""How a benchmark answers: tables or JSON on stdout, `result.json` in a folder, an exit status, one line when it fails.

For benchmarks that have an answer of their own; those that compare systems under one load end in a `Report`. One event loop, in
the caller's thread.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from asyncio import CancelledError
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, RenderableType

from pasture.bench.client import run_loop
from pasture.bench.options import BenchOptions
from pasture.bench.run import describe, machine
from pasture.core.errors import PastureError

INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Answer:
    """What was measured."""

    found: Mapping[str, object]
    """for JSON, beside the settings and the machine"""
    tables: Sequence[RenderableType]
    """for people"""
    status: int = 0
    """exit status"""


Measure = Callable[[BenchOptions, Path, Console], Coroutine[object, object, Answer]]
"""The folder is for logs and state; the console for what is said meanwhile."""


def run_and_answer(name: str, options: BenchOptions, measure: Measure) -> int:
    """Measure and answer. The exit status is the answer's; 1 when there is none; 130 when interrupted."""
    console = Console(stderr=options.as_json)
    folder = options.out or Path(tempfile.mkdtemp(prefix="pasture-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        answer = run_loop(measure(options, folder, console))
    except PastureError as error:  # the logs stay: it may name one
        console.print(f"[red]pasture bench {name}:[/] {error}", highlight=False)
        return 1
    except (KeyboardInterrupt, CancelledError):
        return INTERRUPTED
    if options.out is None:
        shutil.rmtree(folder, ignore_errors=True)
    deliver(answer, options)
    return answer.status


def deliver(answer: Answer, options: BenchOptions) -> None:
    """Into the folder that was asked for, and on stdout."""
    text = json.dumps({"settings": describe(options), "machine": machine(), **answer.found}, indent=2)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "result.json").write_text(text)
    if options.as_json:
        print(text)
        return
    for table in answer.tables:
        Console().print(table)
