"""`pasture bench tiers`: the services for `pasture.bench.tiers` that need an engine put together, and its answer.

`HeavyEngine` is the fake engine with the costs turned round: computing a token takes what Python takes to hash it, and moving
one out of the live cache or into it takes `MOVE_SECONDS`, for real. In the calling thread, but for the services' own.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from pasture.bench.answering import Answer, run_and_answer
from pasture.bench.options import BenchOptions
from pasture.bench.run import progress_bar
from pasture.bench.tiers import FAST, WITH, Outcome, order, ratios, table, too_fast, workloads
from pasture.config import validate_settings
from pasture.core.ports import Service
from pasture.core.values import PoolShape, Restore, Save, StepPlan, StepResult
from pasture.engine.fake import FakeEngine
from pasture.server import service_over

MOVE_SECONDS = 2e-4
"""of a token, out of the live cache or into it"""
CELLS, SEQUENCES = 2048, 32
FAST_PAIRS = 15
"""of runs at least: each takes a fifth of a second, and in one of three the machine takes as long again"""


class HeavyEngine(FakeEngine):
    """Moving KV takes time; the result says how much, as an engine that measures would."""

    def __init__(self) -> None:
        super().__init__(PoolShape(CELLS, SEQUENCES))
        self.transfer_seconds = MOVE_SECONDS

    def execute(self, plan: StepPlan) -> StepResult:
        time.sleep(MOVE_SECONDS * sum(_moved_tokens(operation) for operation in plan.operations))
        started = time.perf_counter()
        result = super().execute(plan)
        return replace(result, decode_seconds=time.perf_counter() - started) if plan.works else result


def main(options: BenchOptions) -> int:
    """Exit status: 0 when measured, whatever came out."""
    return run_and_answer("tiers", options, _measure)


async def _measure(options: BenchOptions, folder: Path, console: Console) -> Answer:
    outcomes = [*await workloads(options, folder, console), *await _fast(options, console)]
    found = {"outcomes": [asdict(outcome) for outcome in outcomes], "ratios": dict(ratios(outcomes))}
    return Answer(found, [table(outcomes)])


def fast_service(side: str) -> Service:
    """A service over a HeavyEngine, with a RAM tier or without."""
    return service_over(HeavyEngine(), validate_settings({"kv_ram": "256MiB" if side == WITH else 0, "kv_layout": "unified"}))


async def _fast(options: BenchOptions, console: Console) -> list[Outcome]:
    outcomes = []
    with progress_bar(console) as progress:
        pairs = max(FAST_PAIRS, options.repeat)
        task = progress.add_task(FAST, total=2 * pairs)
        for number in range(pairs):
            for side in order(number):
                with closing(fast_service(side)) as service:
                    outcomes.append(await too_fast(service, side, options.seed))
                progress.advance(task)
    return outcomes


def _moved_tokens(operation: object) -> int:
    match operation:
        case Save(p0=p0, p1=p1):
            return p1 - p0
        case Restore(slabs=slabs):
            return slabs[-1].p1 - slabs[0].p0
    return 0
