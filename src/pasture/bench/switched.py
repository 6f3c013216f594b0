"""One switch of pasture, on against off: the same load on the same server, in alternation, on one table.

Owns who goes first, the names of the sides, and how their runs become a report. What a run does is its benchmark's business.
The side that is on is the one that ratios are of; the other stands where a peer would.
"""

from __future__ import annotations

import shutil
import tempfile
from asyncio import CancelledError
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from pasture.bench.client import run_loop
from pasture.bench.options import BenchOptions
from pasture.bench.report import print_report
from pasture.bench.results import Report, Run, summarise
from pasture.bench.run import describe, machine, write
from pasture.bench.systems import PASTURE, Running, Size, running, variants
from pasture.core.errors import PastureError


@dataclass(frozen=True, slots=True)
class Side:
    """One position of the switch: what it is called, and the flags of `pasture serve` that make it."""

    label: str
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Switch:
    """What is turned on and off."""

    name: str
    on: tuple[str, ...]
    off: tuple[str, ...]

    def order(self, number: int) -> tuple[Side, Side]:
        """Who goes first in the n-th repetition; each side does in every second."""
        sides = Side(f"{self.name} off", self.off), Side(f"{self.name} on", self.on)
        return sides if number % 2 == 0 else (sides[1], sides[0])

    async def alternate(self, repeat: int, once: Callable[[Side], Awaitable[Run]]) -> list[Run]:
        """Every side `repeat` times."""
        return [await once(side) for number in range(repeat) for side in self.order(number)]

    def report(self, title: str, runs: Sequence[Run], options: BenchOptions) -> Report:
        """Medians of both sides, the one that is on first."""
        summaries = sorted(summarise(runs), key=lambda summary: not summary.label.endswith(" on"))
        return Report(
            title=title,
            settings=describe(options),
            machine=machine(),
            summaries=tuple(summaries),
            best=tuple(summaries),
            users_within_slo={},
            memory={},
            runs=tuple(runs),
        )


@asynccontextmanager
async def serving(side: Side, options: BenchOptions, folder: Path, state: Path | None = None) -> AsyncGenerator[Running]:
    """pasture with the side's flags; `state`: a directory that it gets a copy of as its disk cache. Raises SystemFailed."""
    flags = [*side.flags, *options.serve_flags]
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    if state is not None:
        shutil.copytree(state, cache)
        flags = ["--kv-cache", str(cache), *flags]
    system = variants(PASTURE, Size(1, 0, options.cells), replace(options, serve_flags=tuple(flags)))[0]
    try:
        async with running(replace(system, variant=""), folder / f"{side.label.replace(' ', '-')}.log") as up:
            yield up
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def run_bench(name: str, options: BenchOptions, measure: Callable[[Path, Console], Coroutine[object, object, Report]]) -> int:
    """Measure, print, write; exit status 0, 1 when a system could not be measured or answered with errors."""
    console = Console()
    folder = options.out or Path(tempfile.mkdtemp(prefix="pasture-bench-"))
    try:
        report = run_loop(measure(folder, console))
    except PastureError as error:
        console.print(f"[red]pasture bench {name}:[/] {error}", highlight=False)
        return 1
    except (KeyboardInterrupt, CancelledError):
        return 130
    finally:
        if options.out is None:
            with suppress(OSError):
                shutil.rmtree(folder)
    print_report(report, console)
    if options.out is not None:
        write(report, folder, console)
    return 1 if any(summary.median.errors for summary in report.summaries) else 0
