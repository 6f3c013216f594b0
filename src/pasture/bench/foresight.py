"""`pasture bench foresight`: whether anything gets slower by looking ahead, and what looking ahead takes of the processor.

Every workload, small, on pasture with RAM and disk tiers: with the policy that learns, prefetch and turn-ahead, and with none
of them, in alternation. What foresight takes is what the server counts itself, the choice of what stays in RAM and the thread
that fetches, over all the CPU time of its process while the workload ran. One event loop, in the caller's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import psutil
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from pasture.bench import counters as count
from pasture.bench.answering import Answer, run_and_answer
from pasture.bench.client import Endpoint
from pasture.bench.options import BenchOptions, WorkloadName
from pasture.bench.report import ratio_text, seconds
from pasture.bench.run import measure, progress_bar
from pasture.bench.switched import Side, Switch, serving
from pasture.bench.tiers import NOISE, SMALL_TURNS, SMALL_USERS
from pasture.bench.workloads import Workload, build

FORESIGHT = Switch(
    "foresight",
    ("--kv-policy", "foresight", "--prefetch", "--turn-ahead"),
    ("--kv-policy", "lru", "--no-prefetch", "--no-turn-ahead"),
)
WORKLOADS = (WorkloadName.TEAM, WorkloadName.DOCS, WorkloadName.PRIVATE, WorkloadName.AGENTS)
MOST_CPU = 0.01
"""of a busy server, that foresight may take"""


@dataclass(frozen=True, slots=True)
class Played:
    """One workload once."""

    workload: str
    side: str
    wall_seconds: float
    ttft_mean_seconds: float
    computed_tokens: int
    errors: int
    own_cpu_seconds: float
    """of foresight"""
    cpu_seconds: float
    """of the whole process"""

    @property
    def own_share(self) -> float:
        return self.own_cpu_seconds / self.cpu_seconds if self.cpu_seconds else 0.0


def main(options: BenchOptions) -> int:
    """Exit status: 0 when measured, 1 when a system could not be or answered with errors."""
    return run_and_answer("foresight", options, _measure)


def ratios(played: Sequence[Played]) -> Mapping[str, float]:
    """Median wall with foresight over median wall without, by workload."""
    return {name: _median(played, name, on=True) / _median(played, name, on=False) for name in _names(played)}


def own_shares(played: Sequence[Played]) -> Mapping[str, float]:
    """Foresight's part of the server's CPU time, by workload: the largest of the runs."""
    return {name: max(one.own_share for one in played if one.workload == name) for name in _names(played)}


def table(played: Sequence[Played]) -> Table:
    """One row a workload."""
    runs = max((sum(one.workload == name and _is_on(one) for one in played) for name in _names(played)), default=0)
    made = Table(title="wall with and without foresight" + (f", medians of {runs} alternated runs" if runs > 1 else ""))
    for heading in ("workload", "off", "on", "ratio", "TTFT", "computed", "own CPU", "errors"):
        made.add_column(heading, justify="left" if heading == "workload" else "right")
    for name, ratio in ratios(played).items():
        ours = [one for one in played if one.workload == name]
        off, on = [one for one in ours if not _is_on(one)], [one for one in ours if _is_on(one)]
        share = own_shares(played)[name]
        made.add_row(
            name,
            seconds(_median(played, name, on=False)),
            seconds(_median(played, name, on=True)),
            f"[{'red' if ratio > 1 + NOISE else 'bold'}]{ratio:.2f}x[/]",
            ratio_text(*(median(one.ttft_mean_seconds for one in side) for side in (on, off))),
            ratio_text(*(median(one.computed_tokens for one in side) for side in (on, off))),
            f"[{'red' if share > MOST_CPU else 'bold'}]{share:.2%}[/]",
            str(sum(one.errors for one in ours)),
        )
    return made


def _names(played: Sequence[Played]) -> list[str]:
    return list(dict.fromkeys(one.workload for one in played))


def _is_on(one: Played) -> bool:
    return one.side.endswith(" on")


def _median(played: Sequence[Played], name: str, *, on: bool) -> float:
    return median(one.wall_seconds for one in played if one.workload == name and _is_on(one) is on)


async def _measure(options: BenchOptions, folder: Path, console: Console) -> Answer:
    played: list[Played] = []
    with progress_bar(console) as progress:
        for name in WORKLOADS:
            users, turns = options.users or SMALL_USERS[name], options.turns or SMALL_TURNS
            small = replace(options, workload=name, users=users, turns=turns)
            workload = build(small)
            task = progress.add_task(name.value, total=2 * options.repeat * workload.n_requests)
            for number in range(options.repeat):
                place = folder / f"{name}-{number}"
                played += [await _once(small, workload, side, place, progress, task) for side in FORESIGHT.order(number)]
    found = {
        "played": [asdict(one) for one in played],
        "ratios": dict(ratios(played)),
        "cpu_shares": dict(own_shares(played)),
    }
    return Answer(found, [table(played)], 1 if any(one.errors for one in played) else 0)


async def _once(options: BenchOptions, workload: Workload, side: Side, place: Path, progress: Progress, task: TaskID) -> Played:
    """`place`: a folder for its log, and for its cache while it runs."""
    empty = place / "empty"
    await asyncio.to_thread(empty.mkdir, parents=True, exist_ok=True, mode=0o700)
    async with serving(side, options, place, empty) as up:
        assert up.pid is not None  # it was started here
        process = psutil.Process(up.pid)
        cpu, own = _cpu_seconds(process), await _own_seconds(up.system.endpoint)
        found = (await measure(up, workload, options, lambda _: progress.advance(task))).figures
        cpu, own = _cpu_seconds(process) - cpu, await _own_seconds(up.system.endpoint) - own
    ttft, computed = found.ttft_mean_seconds or 0.0, found.computed_tokens or 0
    return Played(workload.name.value, side.label, found.wall_seconds, ttft, computed, found.errors, own, cpu)


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def _own_seconds(endpoint: Endpoint) -> float:
    """CPU time that foresight has taken since the start, by the server's own counters."""
    counters = await count.counters(endpoint)
    return sum(counters.get(name, 0.0) for name in (count.PREFETCH_CPU_SECONDS, count.POLICY_CPU_SECONDS))
