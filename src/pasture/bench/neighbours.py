"""`pasture bench neighbours`: what tenants notice of one among them that sends fifty times as much as it should.

    alone     seven tenants with a key each: a person asks, reads the short answer, thinks, asks again
    share     an eighth tenant does as they do
    greedy    the eighth has fifty connections instead of one, and nobody there thinks

Everybody asks something new each time, so nothing but the machine is shared. The phases follow each other on one server, which
knows no limits but its own defaults; the first part of each phase is not counted. What counts is how long the seven wait for
their first token. One event loop, in the caller's thread.
"""

from __future__ import annotations

import asyncio
from asyncio import CancelledError
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from time import perf_counter

from rich.console import Console
from rich.table import Table

from pasture.bench.answering import Answer, run_and_answer
from pasture.bench.client import Chat, Endpoint, Exchange, chat
from pasture.bench.corpus import passage
from pasture.bench.measure import quantile
from pasture.bench.options import BenchOptions
from pasture.bench.report import seconds
from pasture.bench.systems import PASTURE, Running, Size, SystemFailed, running, variants

N_TENANTS = 8
TIMES = 50
PROMPT_TOKENS, REPLY_TOKENS = 120, 16
THINK_SECONDS = 12.0
"""mean, where the options say nothing"""
SETTLE_SECONDS = 20.0
PHASE_SECONDS = 100.0
"""counted, after it has settled"""
LIMIT = 1.3


@dataclass(frozen=True, slots=True)
class Phase:
    """What the seven saw in it, and what the eighth got."""

    name: str
    requests: int
    p50_seconds: float
    p95_seconds: float
    eighth_replies: int
    errors: int


def main(options: BenchOptions) -> int:
    """Exit status: 0 when measured without an error, whatever came out."""
    return run_and_answer("neighbours", options, _measure)


async def _measure(options: BenchOptions, folder: Path, console: Console) -> Answer:
    keys = [f"tenant-{number}" for number in range(N_TENANTS)]
    flags = (*options.serve_flags, "--api-key", ",".join(keys))
    system = variants(PASTURE, Size(N_TENANTS, 512, options.cells), replace(options, serve_flags=flags))[0]
    system = replace(system, endpoint=replace(system.endpoint, api_key=keys[0]))
    phases = []
    async with running(system, folder / "neighbours.log") as up:
        for name, n_connections, think in (("alone", 0, True), ("share", 1, True), ("greedy", TIMES, False)):
            console.print(f"{name}: {SETTLE_SECONDS + PHASE_SECONDS:.0f} s", style="dim")
            phases.append(await phase(up, keys, options, name, n_connections, thinks=think))
    found = {
        "phases": [asdict(one) for one in phases],
        "ratio": ratio(phases),
        "ratio_to_nobody": phases[-1].p95_seconds / phases[0].p95_seconds,
    }
    return Answer(found, [table(phases)], 1 if any(one.errors for one in phases[:2]) else 0)


async def phase(up: Running, keys: list[str], options: BenchOptions, name: str, n_connections: int, *, thinks: bool) -> Phase:
    """One phase. Raises SystemFailed when nobody was answered in it."""
    start = perf_counter() + SETTLE_SECONDS
    end = start + PHASE_SECONDS
    endpoints = [replace(up.system.endpoint, api_key=key) for key in keys]
    mean = options.think_time or THINK_SECONDS
    seven = [
        asyncio.create_task(_person(up, endpoint, Random(f"{options.seed} {name} {number}"), end, mean, options))
        for number, endpoint in enumerate(endpoints[1:])
    ]
    eighth = [
        asyncio.create_task(
            _person(up, endpoints[0], Random(f"{options.seed} {name} eighth {number}"), end, mean if thinks else 0.0, options)
        )
        for number in range(n_connections)
    ]
    asked = [exchange for person in await asyncio.gather(*seven) for exchange in person]
    for task in eighth:
        task.cancel()
    others = [one for one in await asyncio.gather(*eighth, return_exceptions=True) if isinstance(one, list)]
    waits = [one.ttft_seconds for one in asked if one.sent >= start and one.error is None]
    if not waits:
        raise SystemFailed(f"nobody was answered: {asked[0].error if asked else 'nobody asked'}")
    return Phase(
        name,
        len(waits),
        quantile(waits, 0.5) or 0.0,
        quantile(waits, 0.95) or 0.0,
        sum(one.error is None for person in others for one in person),
        sum(one.error is not None for one in asked),
    )


async def _person(
    up: Running, endpoint: Endpoint, rng: Random, end: float, think_seconds: float, options: BenchOptions
) -> list[Exchange]:
    """Asks until `end`; cancelled, it says what it has got."""
    exchanges: list[Exchange] = []
    try:
        if think_seconds:
            await asyncio.sleep(rng.uniform(0.0, think_seconds))
        while perf_counter() < end:
            text = f"{passage(rng, PROMPT_TOKENS)}\n\nWhat is this about?"
            request = Chat("", ({"role": "user", "content": text},), REPLY_TOKENS, up.model)
            exchanges.append(await chat(endpoint, request, timeout_seconds=options.request_timeout))
            if think_seconds:
                await asyncio.sleep(rng.expovariate(1 / think_seconds))
    except CancelledError:
        pass  # the others are done
    return exchanges


def ratio(phases: list[Phase]) -> float:
    """The seven's p95 beside a greedy tenant, to that beside one that keeps to its share."""
    return phases[-1].p95_seconds / phases[1].p95_seconds


def table(phases: list[Phase]) -> Table:
    """The phases, and the ratio that counts."""
    found = Table(title=f"Time to first token of {N_TENANTS - 1} tenants, beside one that sends {TIMES} times its share")
    for heading in ("the eighth tenant", "requests", "p50", "p95", "to its share", "its own replies", "errors"):
        found.add_column(heading, justify="left" if heading == "the eighth tenant" else "right")
    names = {"alone": "is not there", "share": "sends its share", "greedy": f"sends {TIMES} times as much"}
    for one in phases:
        found.add_row(
            names[one.name],
            str(one.requests),
            seconds(one.p50_seconds),
            seconds(one.p95_seconds),
            f"{one.p95_seconds / phases[1].p95_seconds:.2f}x",
            str(one.eighth_replies),
            str(one.errors),
        )
    found.caption = f"wanted: at most {LIMIT}x"
    return found
