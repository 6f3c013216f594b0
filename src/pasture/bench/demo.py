"""`make demo`: sixteen people on one model, first on one pasture, then with a context each; then a pasture stays up.

A short `team` against `isolated`, each with just the cells that the workload needs. Ends with three figures beside what is
aimed at (users 5 -> 15+, mean latency -60 %, memory -40 %), and with a URL that answers until Ctrl-C or SIGTERM. One event
loop, in the caller's thread.
"""

from __future__ import annotations

import asyncio
import tempfile
from asyncio import CancelledError
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from pasture.bench import counters as count
from pasture.bench.client import Endpoint, run_loop
from pasture.bench.options import BenchOptions, WorkloadName
from pasture.bench.report import mebibytes, print_errors, seconds
from pasture.bench.results import Run
from pasture.bench.run import measure
from pasture.bench.systems import PASTURE, Running, Size, loaded_file, repack_survives, running, variants
from pasture.bench.workloads import CELL_MARGIN, Workload, build, rounded_cells
from pasture.core.errors import PastureError

TURNS = 2
CONTEXT_USERS = 5
PROMPT_SECONDS = 5.0
"""what counts as a prompt first token in the summary"""
POLL_SECONDS = 1.0


def main(options: BenchOptions) -> int:
    """Exit status: 0 after Ctrl-C or SIGTERM in the end, 1 when a system could not be measured, 130 when ended before."""
    console = Console()
    try:
        return run_loop(Demo(options, console).run())
    except PastureError as error:
        console.print(f"[red]pasture demo:[/] {error}", highlight=False)
        return 1
    except (KeyboardInterrupt, CancelledError):
        return 130


class Demo:
    """The demonstration, told to a console."""

    def __init__(self, options: BenchOptions, console: Console) -> None:
        self._options = replace(options, workload=WorkloadName.TEAM, turns=options.turns or TURNS)
        self._workload = build(self._options)
        self._console = console
        self._folder = options.out or Path(tempfile.mkdtemp(prefix="pasture-demo-"))

    async def run(self) -> int:
        """Exit status: 0, or 1 when a request failed. Raises PastureError when a system cannot be measured."""
        workload, console = self._workload, self._console
        console.print(
            f"{workload.users} people ask a help desk {workload.n_requests} questions. Its instructions are about 1,000 tokens "
            "long and the same for everybody.",
            highlight=False,
        )
        each = rounded_cells(workload.longest_tokens)
        together = Size(workload.users, workload.longest_tokens, rounded_cells(workload.pool_tokens + CELL_MARGIN))
        ours = variants(PASTURE, together, self._options)[0]
        async with running(ours, self._folder / "pasture.log") as up:
            loaded = await loaded_file(up)
            shared = await self._play(up, f"one pasture, {together.cells:,} cells")
        if (waited := first_shared(shared)) is not None:
            console.print(f"The first answer that shared came after {seconds(waited)}.", highlight=False)
        repack = await repack_survives(self._options, self._folder, loaded)
        alone = Size(workload.users, workload.longest_tokens, workload.users * each)
        baseline = variants("isolated", alone, self._options, repack=repack, loaded=loaded)[0]
        async with running(baseline, self._folder / "isolated.log") as up:
            isolated = await self._play(up, f"a context each, {alone.cells:,} cells")
        for run in (shared, isolated):
            print_errors(run, console)
        console.print(_summary(isolated, shared, workload, each))
        if self._options.wait:
            async with running(ours, self._folder / "pasture-again.log") as up:
                await self._stay(up.system.endpoint)
        return 1 if isolated.figures.errors or shared.figures.errors else 0

    async def _play(self, up: Running, label: str) -> Run:
        columns = (
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[pool]}"),
        )
        with Progress(*columns, console=self._console, refresh_per_second=2) as progress:
            task = progress.add_task(label, total=self._workload.n_requests, pool="")
            async with _pool_watched(up.system.endpoint, progress, task):
                return await measure(up, self._workload, self._options, lambda _: progress.advance(task))

    async def _stay(self, endpoint: Endpoint) -> None:
        example = (
            f"curl -N {endpoint.url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
            """  -d '{"messages": [{"role": "user", "content": "What is a Python generator?"}], "stream": true}'"""
        )
        self._console.print(
            f"\npasture stays up at {endpoint.url} until Ctrl-C. Try:\n\n{example}\n",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        with suppress(CancelledError):
            await asyncio.Event().wait()


@asynccontextmanager
async def _pool_watched(endpoint: Endpoint, progress: Progress, task: TaskID) -> AsyncGenerator[None]:
    """Keeps the progress line's picture of the pool up to date meanwhile, for a server that has one."""

    async def watch() -> None:
        while True:
            now = await count.counters(endpoint)
            if count.USED_CELLS in now:
                used, saved = now[count.USED_CELLS], now.get(count.SAVED_CELLS, 0.0)
                progress.update(task, pool=f"{used:,.0f} cells hold {used + saved:,.0f} tokens")
            await asyncio.sleep(POLL_SECONDS)

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)


def _summary(isolated: Run, shared: Run, workload: Workload, each_cells: int) -> Table:
    alone, ours = isolated.figures, shared.figures
    table = Table(title=f"{workload.users} people, one model")
    for heading in ("", "a context each", "pasture", "gain", "aim"):
        table.add_column(heading, justify="left" if not heading else "right")
    fitting = users_that_fit(CONTEXT_USERS * each_cells, shared)
    table.add_row(
        f"people in the memory of {CONTEXT_USERS} contexts",
        str(CONTEXT_USERS),
        "-" if fitting is None else str(fitting),
        "",
        "5 -> 15+",
    )
    table.add_row(
        "mean latency",
        "-" if alone.latency_mean_seconds is None else seconds(alone.latency_mean_seconds),
        "-" if ours.latency_mean_seconds is None else seconds(ours.latency_mean_seconds),
        change(ours.latency_mean_seconds, alone.latency_mean_seconds),
        "-60 %",
    )
    table.add_row(
        "peak memory",
        "-" if alone.peak_bytes is None else mebibytes(alone.peak_bytes),
        "-" if ours.peak_bytes is None else mebibytes(ours.peak_bytes),
        change(ours.peak_bytes, alone.peak_bytes),
        "-40 %",
    )
    table.add_section()
    table.add_row(
        "everything answered after",
        seconds(alone.wall_seconds),
        seconds(ours.wall_seconds),
        change(ours.wall_seconds, alone.wall_seconds),
        "",
    )
    table.add_row(
        f"people who always saw a first word within {PROMPT_SECONDS:g} s",
        f"{promptly_served(isolated)} of {workload.users}",
        f"{promptly_served(shared)} of {workload.users}",
        "",
        "",
    )
    return table


def users_that_fit(cells: int, shared: Run) -> int | None:
    """How many such users a shared pool of `cells` holds, from the cells that this run's users needed in it.

    With n users, an opening of o tokens and e tokens of everybody's own, a pool holds o + sum(e), and contexts of their own
    would hold n * o + sum(e). None where the server does not tell its tokens, or for a single user.
    """
    together = shared.figures.workload_cells
    lengths: dict[str, int] = {}
    for trace in shared.traces:
        if trace.prompt_tokens is not None:
            lengths[trace.user] = max(lengths.get(trace.user, 0), trace.prompt_tokens + 1 + len(trace.gaps))
    if together is None or len(lengths) < 2:
        return None
    opening = (sum(lengths.values()) - together) / (len(lengths) - 1)
    own = max(1.0, (together - opening) / len(lengths))
    return int(max(0.0, cells - opening) / own)


def promptly_served(run: Run) -> int:
    """Users whose every first token came within PROMPT_SECONDS."""
    late = {t.user for t in run.traces if t.first is None or t.first - t.sent > PROMPT_SECONDS}
    return len({trace.user for trace in run.traces} - late)


def first_shared(run: Run) -> float | None:
    """Seconds until the first text of a reply whose prompt was in part somebody's already."""
    return min((trace.first for trace in run.traces if trace.cached_tokens and trace.first is not None), default=None)


def change(ours: float | None, theirs: float | None) -> str:
    """`-62 %`, or nothing where there is nothing to compare."""
    return f"{(ours / theirs - 1) * 100:+.0f} %" if ours is not None and theirs else ""
