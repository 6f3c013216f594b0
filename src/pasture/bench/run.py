"""`pasture bench WORKLOAD`: the systems in turn, in alternation, then tables, JSON and a page.

Owns the order of things: build the workload, run every variant of every system `repeat` times (A B C A B C), take medians,
then the optional searches (users inside a service level, memory at equal users) with each peer's better variant. A system is
started cold for every run and warmed with a request that shares nothing with the workload. One event loop, in the caller's
thread.
"""

from __future__ import annotations

import platform
import re
import tempfile
from asyncio import CancelledError
from collections.abc import Iterator
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pasture.bench import counters as count
from pasture.bench.client import Chat, Exchange, chat, run_loop
from pasture.bench.distinct import PromptTokens, distinct_prompt_tokens
from pasture.bench.drive import Progress as OnExchange
from pasture.bench.drive import Target, play
from pasture.bench.measure import Figures, Outside, figures
from pasture.bench.options import BenchOptions, WorkloadName
from pasture.bench.report import print_report
from pasture.bench.results import Report, Run, best_variants, summarise, traces
from pasture.bench.slo import Outlook, largest, within
from pasture.bench.systems import (
    PASTURE,
    Running,
    Size,
    System,
    SystemFailed,
    default_model,
    default_threads,
    loaded_file,
    repack_survives,
    running,
    variants,
)
from pasture.bench.workloads import CELL_MARGIN, Workload, build, crowded_cells, rounded_cells
from pasture.core.errors import PastureError

_LEFT_OUT = {"api_key", "weights"}
"""of what describes a run: a secret, and what only `quality` goes by"""
_NOT_A_NAME = re.compile(r"[^A-Za-z0-9]+")
_WARM_UP = Chat("warm-up", ({"role": "system", "content": "~"}, {"role": "user", "content": "0123456789"}), 8)


def main(options: BenchOptions) -> int:
    """Exit status: 0, or 1 when a system could not be measured or answered with errors."""
    console = Console()
    try:
        return run_loop(Bench(options, console).run())
    except PastureError as error:
        console.print(f"[red]pasture bench:[/] {error}", highlight=False)
        return 1
    except (KeyboardInterrupt, CancelledError):
        return 130


async def measure(up: Running, workload: Workload, options: BenchOptions, on_exchange: OnExchange) -> Run:
    """Warm a system that was just started, play the workload once, and look at it from inside and outside.

    Raises SystemFailed when it does not answer at all.
    """
    system, endpoint = up.system, up.system.endpoint
    warm = await chat(endpoint, replace(_WARM_UP, model=up.model), timeout_seconds=options.request_timeout)
    if warm.error is not None:
        raise SystemFailed(f"{system.label} does not answer: {warm.error}")
    before = await count.counters(endpoint)
    exchanges = await play(workload, Target(endpoint, up.model, options.request_timeout), on_exchange)
    after = await count.counters(endpoint)
    peak_bytes = None if up.memory is None else await up.memory.sample()
    tokens = await PromptTokens.of(endpoint)
    distinct, cells = (None, None) if tokens is None else await distinct_prompt_tokens(warm, exchanges, tokens)
    counted = count.increase(before, after, count.COMPUTED_TOKENS)
    peak_cells = after.get(count.PEAK_CELLS)
    outside = Outside(
        distinct_tokens=distinct,
        workload_cells=cells,
        counted_tokens=None if counted is None else round(counted),
        peak_cells=None if peak_cells is None else round(peak_cells),
        peak_bytes=peak_bytes,
    )
    return Run(system.peer, system.label, figures(exchanges, outside), traces(exchanges))


class _Hopeless(Exception):
    """A run is outside its service level, however it goes on."""


class Bench:
    """One benchmark from options to report."""

    def __init__(self, options: BenchOptions, console: Console) -> None:
        self._workload = build(options)
        if options.workload is WorkloadName.CROWDED:
            options = replace(options, cells=crowded_cells(self._workload))
        self._options = options
        self._console = console
        self._folder = options.out or Path(tempfile.mkdtemp(prefix="pasture-bench-"))
        self._repack = False
        self._loaded: Path | None = None
        """what pasture computes with, once it has been asked"""

    async def run(self) -> int:
        """Measure, print, write. Exit status as `main` documents it."""
        if any(_started(peer) for peer in self._options.against):
            self._repack = await repack_survives(self._options, self._folder)
        runs = await self._alternate()
        best = best_variants(summarise(runs))
        report = Report(
            title=f"pasture bench {self._workload.name}: {self._workload.users} users, {self._workload.n_requests} requests, "
            f"{self._options.cells:,} cells",
            settings=describe(self._options) | {"pasture_computes_with": self._loaded.name if self._loaded else "not known"},
            machine=machine(),
            summaries=summarise(runs),
            best=best,
            users_within_slo={s.peer: await self._users_within_slo(s.peer, s.label) for s in best} if self._options.slo else {},
            memory={s.peer: await self._tight(s.peer, s.label, s.median) for s in best if _started(s.peer)}
            if self._options.equal_memory
            else {},
            runs=tuple(runs),
        )
        print_report(report, self._console)
        if self._options.out is not None:
            write(report, self._folder, self._console)
        return 1 if any(summary.median.errors for summary in report.best) else 0

    async def _alternate(self) -> list[Run]:
        runs = []
        with progress_bar(self._console) as progress:
            for repeat in range(self._options.repeat):
                for system in self._systems(self._workload, self._options.cells):
                    label = f"{system.label}, run {repeat + 1} of {self._options.repeat}"
                    runs.append(await self._once(system, self._workload, label, progress))
        return runs

    async def _once(
        self, system: System, workload: Workload, label: str, progress: Progress, outlook: Outlook | None = None
    ) -> Run:
        """`outlook`: who may say that the run need not go on, which raises _Hopeless."""
        task = progress.add_task(label, total=workload.n_requests)

        def ended(exchange: Exchange) -> None:
            progress.advance(task)
            if outlook is not None and outlook.lost(exchange):
                raise _Hopeless

        log = self._folder / f"{_NOT_A_NAME.sub('-', system.label).strip('-')}.log"
        async with running(system, log) as up:
            if system.peer == PASTURE:
                self._loaded = await loaded_file(up)
            try:
                return await measure(up, workload, self._options, ended)
            except* _Hopeless:
                progress.update(task, description=f"{label}: outside")
        raise _Hopeless

    def _systems(self, workload: Workload, cells: int) -> Iterator[System]:
        """pasture first: from then on it is known what it computes with."""
        for peer in (PASTURE, *self._options.against):
            yield from self._variants(peer, workload, cells)

    def _variant(self, peer: str, label: str, workload: Workload, cells: int) -> System:
        return next(system for system in self._variants(peer, workload, cells) if system.label == label)

    def _variants(self, peer: str, workload: Workload, cells: int) -> list[System]:
        size = Size(workload.users, workload.longest_tokens, cells)
        return variants(peer, size, self._options, repack=self._repack, loaded=self._loaded)

    async def _users_within_slo(self, peer: str, label: str) -> int:
        with progress_bar(self._console) as progress:

            async def holds(users: int) -> bool:
                workload = build(self._options, users=users)
                system = self._variant(peer, label, workload, self._options.cells)
                outlook = Outlook(self._options.slo, workload.n_requests)
                try:
                    run = await self._once(system, workload, f"{label}, {users} users", progress, outlook)
                except _Hopeless:
                    return False
                return within(run.figures, self._options.slo)

            return await largest(holds, self._options.slo_max_users)

    async def _tight(self, peer: str, label: str, seen: Figures) -> Figures:
        cells = cells_needed(peer, seen, self._workload)
        with progress_bar(self._console) as progress:
            system = self._variant(peer, label, self._workload, cells)
            run = await self._once(system, self._workload, f"{label}, {cells} cells", progress)
        return run.figures


def write(report: Report, folder: Path, console: Console) -> None:
    """`result.json`, and `report.html` where plotly is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    report.write_json(folder / "result.json")
    written = [folder / "result.json"]
    try:
        from pasture.bench.page import write_page
    except ImportError:
        console.print("no HTML page: it needs `pip install 'pasture[bench]'`")
    else:
        write_page(report, folder / "report.html")
        written.append(folder / "report.html")
    console.print("written: " + ", ".join(str(path) for path in written))


def cells_needed(peer: str, seen: Figures, workload: Workload) -> int:
    """The cells that hold the workload: for pasture what its pool used at most, for others a whole conversation a user."""
    if peer == PASTURE:
        known = [cells for cells in (seen.peak_cells, seen.workload_cells) if cells is not None]
        if known:
            return rounded_cells(min(known) + CELL_MARGIN)
    return workload.users * rounded_cells(seen.longest_tokens or workload.longest_tokens)


def describe(options: BenchOptions) -> dict[str, str]:
    """Every option as text, defaults resolved, secrets left out."""
    values = {entry.name: getattr(options, entry.name) for entry in fields(options) if entry.name not in _LEFT_OUT}
    values["model"] = (options.model or default_model()).name
    values["threads"] = options.threads or default_threads()
    return {name: ", ".join(map(str, value)) if isinstance(value, tuple) else str(value) for name, value in values.items()}


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": f"{psutil.cpu_count(logical=False)} physical, {psutil.cpu_count()} logical",
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "python": platform.python_version(),
        "llama-cpp-python": version("llama-cpp-python"),
    }


def progress_bar(console: Console) -> Progress:
    """One line a task: what, how far, since when."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, refresh_per_second=2)


def _started(peer: str) -> bool:
    return not peer.startswith(("http://", "https://"))
