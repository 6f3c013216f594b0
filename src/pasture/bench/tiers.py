"""`pasture bench tiers`: whether anything gets slower by having storage tiers, and what the gate does where fetching loses.

    every workload, small         pasture with RAM and disk tiers, and pasture with neither, in alternation: medians
    an engine that is too fast    computing costs it next to nothing and moving KV a lot: a service with a store and one without

Owns the alternation, the traffic of the second kind and the table. The services for the second kind come from the caller, who
knows engines. One event loop, in the caller's thread.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from statistics import median
from uuid import uuid4

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from pasture.bench.options import BenchOptions, WorkloadName
from pasture.bench.report import seconds
from pasture.bench.run import measure, progress_bar
from pasture.bench.systems import PASTURE, Size, System, running, variants
from pasture.bench.workloads import Workload, build, crowded_cells
from pasture.core.errors import EngineError
from pasture.core.ports import Service
from pasture.core.values import Request, RequestId, SamplingParams

WITHOUT, WITH = "without", "with"
SMALL_USERS = {
    WorkloadName.TEAM: 8,
    WorkloadName.DOCS: 6,
    WorkloadName.PRIVATE: 4,
    WorkloadName.AGENTS: 6,
    WorkloadName.CROWDED: 6,
}
SMALL_TURNS = 2
NOISE = 0.05
"""a ratio up to 1 + this counts as no slower"""

FAST = "fake engine, fetching loses"
FAST_CONVERSATIONS, FAST_TOKENS, FAST_TURNS, FAST_AT_ONCE = 24, 500, 3, 3
"""traffic that a pool of 2,048 cells cannot keep: whoever comes back has been evicted"""
FAST_REPLY_TOKENS = 8
_FIRST_BYTE, _LAST_BYTE = 97, 122


@dataclass(frozen=True, slots=True)
class Outcome:
    """One workload once."""

    workload: str
    side: str
    """`WITH` or `WITHOUT`"""
    wall_seconds: float
    ttft_mean_seconds: float
    computed_tokens: int
    errors: int
    refusals: int
    """transfers that the gate did not allow; counted for the fake engine alone"""


async def workloads(options: BenchOptions, folder: Path, console: Console) -> list[Outcome]:
    """Every workload `repeat` times with and without tiers; who goes first alternates too."""
    outcomes = []
    with progress_bar(console) as progress:
        for name, users in SMALL_USERS.items():
            small = replace(options, workload=name, users=options.users or users, turns=options.turns or SMALL_TURNS)
            workload = build(small)
            small = replace(small, cells=crowded_cells(workload) if name is WorkloadName.CROWDED else options.cells)
            task = progress.add_task(name.value, total=2 * options.repeat * workload.n_requests)
            for number in range(options.repeat):
                first, second = order(number)
                place = folder / f"{name}-{number}"
                outcomes.append(await _once(small, workload, first, place, progress, task))
                outcomes.append(await _once(small, workload, second, place, progress, task))
    return outcomes


async def too_fast(service: Service, side: str, seed: int) -> Outcome:
    """The traffic against one service, which is left running."""
    rng = Random(f"fast-{seed}")
    conversations = [_letters(rng, FAST_TOKENS) for _ in range(FAST_CONVERSATIONS)]
    waits: list[float] = []
    before = service.statistics()
    started = time.perf_counter()
    for _ in range(FAST_TURNS):
        for at in range(0, FAST_CONVERSATIONS, FAST_AT_ONCE):
            batch = conversations[at : at + FAST_AT_ONCE]
            waits += await asyncio.gather(*(_turn(service, rng, tokens) for tokens in batch))
    wall = time.perf_counter() - started
    after = service.statistics()
    computed = after.scheduler.computed_tokens_total - before.scheduler.computed_tokens_total
    refusals = sum(after.store.gate_refusals.values())
    return Outcome(FAST, side, wall, sum(waits) / len(waits), computed, 0, refusals)


def order(number: int) -> tuple[str, str]:
    """Who goes first in the n-th repetition."""
    return (WITHOUT, WITH) if number % 2 == 0 else (WITH, WITHOUT)


def ratios(outcomes: Sequence[Outcome]) -> Mapping[str, float]:
    """Median wall with tiers over median wall without, by workload."""
    names = dict.fromkeys(outcome.workload for outcome in outcomes)
    return {name: _median(outcomes, name, WITH) / _median(outcomes, name, WITHOUT) for name in names}


def table(outcomes: Sequence[Outcome]) -> Table:
    """One row a workload."""
    made = Table(title="wall with and without tiers, medians of alternated runs")
    for heading in ("workload", "without", "with", "ratio", "computed without", "computed with", "refused", "errors"):
        made.add_column(heading, justify="left" if heading == "workload" else "right")
    for name, ratio in ratios(outcomes).items():
        ours = [outcome for outcome in outcomes if outcome.workload == name]
        computed = {side: median(o.computed_tokens for o in ours if o.side == side) for side in (WITHOUT, WITH)}
        made.add_row(
            name,
            seconds(_median(outcomes, name, WITHOUT)),
            seconds(_median(outcomes, name, WITH)),
            f"[{'red' if ratio > 1 + NOISE else 'bold'}]{ratio:.2f}x[/]",
            f"{computed[WITHOUT]:,.0f}",
            f"{computed[WITH]:,.0f}",
            f"{max(o.refusals for o in ours):,}",
            str(sum(o.errors for o in ours)),
        )
    pairs = Counter(outcome.workload for outcome in outcomes if outcome.side == WITH)
    made.caption = "pairs of runs: " + "; ".join(f"{name} {n}" for name, n in pairs.items())
    return made


async def _once(options: BenchOptions, workload: Workload, side: str, place: Path, progress: Progress, task: TaskID) -> Outcome:
    """`place`: a folder for its log, and for its cache while it runs."""
    cache = place / "cache"
    async with running(_system(options, side, cache), place / f"{side}.log") as up:
        found = (await measure(up, workload, options, lambda _: progress.advance(task))).figures
    shutil.rmtree(cache, ignore_errors=True)
    ttft, computed = found.ttft_mean_seconds or 0.0, found.computed_tokens or 0
    return Outcome(workload.name.value, side, found.wall_seconds, ttft, computed, found.errors, 0)


def _median(outcomes: Sequence[Outcome], name: str, side: str) -> float:
    return median(outcome.wall_seconds for outcome in outcomes if (outcome.workload, outcome.side) == (name, side))


def _system(options: BenchOptions, side: str, cache: Path) -> System:
    flags = ("--kv-cache", str(cache)) if side == WITH else ("--kv-ram", "0")
    chosen = replace(options, serve_flags=(*flags, *options.serve_flags))
    return variants(PASTURE, Size(options.users or 1, 0, options.cells), chosen)[0]


async def _turn(service: Service, rng: Random, tokens: list[int]) -> float:
    """One more question in a conversation, whose tokens grow by it; seconds to the first token of the reply."""
    tokens += _letters(rng, 8)
    request = Request(RequestId(uuid4().hex), tuple(tokens), FAST_REPLY_TOKENS, SamplingParams(temperature=0.0))
    started, first = time.perf_counter(), 0.0
    async for event in service.generate(request):
        if event.token is not None:
            first = first or time.perf_counter()
            tokens.append(event.token)
        if event.finish is not None and event.finish.error is not None:
            raise EngineError(f"a request failed: {event.finish.error}")
    return first - started


def _letters(rng: Random, n_tokens: int) -> list[int]:
    return [rng.randint(_FIRST_BYTE, _LAST_BYTE) for _ in range(n_tokens)]
