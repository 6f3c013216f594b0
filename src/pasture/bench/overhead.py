"""`pasture bench overhead`: what pasture itself costs, beside the model.

Two measurements. With the real model: 16 streams that only decode; the server's own counters say how much of the engine
thread's step is spent inside `llama_decode`, and the rest is pasture. Where the pool moves to another layout meanwhile, which
happens once for such traffic and takes as long as some steps, the next steps are measured, and the table says so. With the fake
engine, whose steps cost nothing: 32 streaming connections against a server pinned to one core, the client on another; the
streamed tokens a second are what HTTP carries. Where the system cannot pin processes the second figure is marked as not pinned.
One event loop, in the caller's thread.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pasture.bench import counters as count
from pasture.bench.answering import Answer, run_and_answer
from pasture.bench.client import Chat, Endpoint, Exchange, chat
from pasture.bench.options import BenchOptions
from pasture.bench.systems import PASTURE, Running, Size, System, SystemFailed, free_port, running, variants

STREAMS = 16
DECODE_ROUNDS = 64
MOST_WINDOWS = 3
"""of so many rounds, until the layout stays in one"""
CONNECTIONS = 32
STREAM_TOKENS = 512
SETTLE_SECONDS = 1.0
OVERHEAD_LIMIT = 0.03
TOKENS_PER_SECOND_FLOOR = 4000
POLL_SECONDS = 0.5
WAIT_SECONDS = 120.0

_PINNED = (
    "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
)


@dataclass(frozen=True, slots=True)
class StepCost:
    """Engine steps between two readings of the counters, all of them decoding."""

    steps: int
    step_seconds: float
    decode_seconds: float
    sample_seconds: float
    client_gap_seconds: float
    """median gap between tokens, as the clients saw it"""
    layout_moves: int = 0
    """in the windows that were left out for them"""

    @property
    def share(self) -> float:
        """Of the engine thread's time, what was not spent inside llama_decode."""
        return (self.step_seconds - self.decode_seconds) / self.step_seconds


@dataclass(frozen=True, slots=True)
class Throughput:
    """What the HTTP side streamed while the engine cost nothing."""

    tokens_per_second: float
    pinned: bool
    errors: tuple[str, ...]


def main(options: BenchOptions) -> int:
    """Exit status: 0 when both were measured without an error, whatever came out."""
    return run_and_answer("overhead", options, _measure)


async def _measure(options: BenchOptions, folder: Path, console: Console) -> Answer:
    with console.status(f"{STREAMS} streams on the real model"):
        cost = await step_cost(options, folder)
    with console.status(f"{CONNECTIONS} streams on the fake engine"):
        carried = await http_throughput(options, folder)
    errors = [Text.assemble(("fake engine: ", "red"), error) for error in dict.fromkeys(carried.errors)]
    found = {"step": asdict(cost) | {"share": cost.share}, "http": asdict(carried)}
    return Answer(found, [_table(cost, carried), *errors], 1 if carried.errors else 0)


async def step_cost(options: BenchOptions, folder: Path) -> StepCost:
    """Decode with the real model and read the counters. Raises SystemFailed when the server does not count."""
    users = options.users or STREAMS
    system = variants(PASTURE, Size(users, 256, options.cells), options)[0]
    async with running(system, folder / "overhead.log") as up:
        n_tokens = (MOST_WINDOWS + 1) * DECODE_ROUNDS
        streams = [asyncio.create_task(_stream(up, index, n_tokens, options)) for index in range(users)]
        moves = 0
        try:
            after = await _reading(system.endpoint, lambda now: now.get(count.DECODING_REQUESTS, 0) >= users)
            for _ in range(MOST_WINDOWS):
                before, goal = after, after[count.GENERATED_TOKENS] + users * DECODE_ROUNDS
                after = await _reading(system.endpoint, _has_generated(goal))
                moved = round(after[count.LAYOUT_MOVES] - before[count.LAYOUT_MOVES])
                if not moved:
                    break
                moves += moved
            exchanges = await asyncio.gather(*streams)
        finally:
            for stream in streams:
                stream.cancel()
    gaps = [gap for exchange in exchanges for gap in exchange.gaps_seconds]
    if not gaps:
        raise SystemFailed(f"no stream came: {exchanges[0].error}")
    return StepCost(
        steps=round(after[count.STEPS] - before[count.STEPS]),
        step_seconds=after[count.STEP_SECONDS] - before[count.STEP_SECONDS],
        decode_seconds=after[count.DECODE_SECONDS] - before[count.DECODE_SECONDS],
        sample_seconds=after[count.SAMPLE_SECONDS] - before[count.SAMPLE_SECONDS],
        client_gap_seconds=median(gaps),
        layout_moves=moves,
    )


async def http_throughput(options: BenchOptions, folder: Path) -> Throughput:
    """Stream from the fake engine over many connections for `options.seconds`."""
    port = free_port()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    serve = ["-m", "pasture", "serve", "--fake-engine", "-c", "65536", "--host", "127.0.0.1", "--port", str(port)]
    serve += ["--kv-layout", "unified"]  # `auto` follows the cost of steps, and these cost nothing
    pinned = len(cores) > 1
    command = [sys.executable, "-c", _PINNED, str(cores[0]), *serve] if pinned else [sys.executable, *serve]
    system = System(PASTURE, "fake engine", tuple(command), Endpoint("127.0.0.1", port))
    async with running(system, folder / "overhead-http.log") as up:
        with _on_core(cores[-1] if pinned else None):
            start = time.perf_counter() + SETTLE_SECONDS
            end = start + options.seconds
            rounds = await asyncio.gather(*(_keep_streaming(up, index, end, options) for index in range(CONNECTIONS)))
    exchanges = [exchange for exchanges in rounds for exchange in exchanges]
    return Throughput(
        tokens_per_second=sum(tokens_between(exchange, start, end) for exchange in exchanges) / options.seconds,
        pinned=pinned,
        errors=tuple(exchange.error for exchange in exchanges if exchange.error is not None),
    )


def tokens_between(exchange: Exchange, start: float, end: float) -> float:
    """Tokens that came in `[start, end)`; a chunk counts for as many as the reply has tokens a chunk."""
    if not exchange.text_times:
        return 0.0
    chunks = sum(start <= moment < end for moment in exchange.text_times)
    return chunks * (exchange.completion_tokens or len(exchange.text_times)) / len(exchange.text_times)


async def _reading(endpoint: Endpoint, enough: Callable[[Mapping[str, float]], bool]) -> Mapping[str, float]:
    """The counters, as soon as they are `enough`."""
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            now = await count.counters(endpoint)
            if count.STEP_SECONDS not in now:
                raise SystemFailed(f"{endpoint.url}/metrics has no {count.STEP_SECONDS}")
            if enough(now):
                return now
            await asyncio.sleep(POLL_SECONDS)


def _has_generated(n_tokens: float) -> Callable[[Mapping[str, float]], bool]:
    return lambda now: now[count.GENERATED_TOKENS] >= n_tokens


async def _stream(up: Running, index: int, max_tokens: int, options: BenchOptions) -> Exchange:
    messages = ({"role": "system", "content": "You tell stories."}, {"role": "user", "content": f"Tell me story {index}."})
    request = Chat(f"stream {index}", messages, max_tokens, up.model)
    return await chat(up.system.endpoint, request, timeout_seconds=options.request_timeout)


async def _keep_streaming(up: Running, index: int, end: float, options: BenchOptions) -> Sequence[Exchange]:
    exchanges = []
    while time.perf_counter() < end:
        exchanges.append(await _stream(up, index, STREAM_TOKENS, options))
        if exchanges[-1].error is not None:
            break
    return exchanges


@contextmanager
def _on_core(core: int | None) -> Iterator[None]:
    if core is None:
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _table(cost: StepCost, carried: Throughput) -> Table:
    table = Table(title="what pasture costs beside the model")
    for heading in ("", "measured", "wanted"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row(f"around llama_decode, of a step ({cost.steps} steps)", f"{cost.share:.2%}", f"at most {OVERHEAD_LIMIT:.0%}")
    table.add_row("  a step", f"{cost.step_seconds / cost.steps * 1000:.2f} ms", "")
    table.add_row("  of it inside llama_decode", f"{cost.decode_seconds / cost.steps * 1000:.2f} ms", "")
    table.add_row("  of it sampling", f"{cost.sample_seconds / cost.steps * 1000:.2f} ms", "")
    table.add_row("  between tokens, as clients see it", f"{cost.client_gap_seconds * 1000:.2f} ms", "")
    if cost.layout_moves:
        table.add_row("  moves of the layout before that, not counted", str(cost.layout_moves), "")
    place = "server on one core" if carried.pinned else "not pinned"
    wanted = f"at least {TOKENS_PER_SECOND_FLOOR:,}"
    table.add_row(f"streamed tokens/s, {CONNECTIONS} connections, {place}", f"{carried.tokens_per_second:,.0f}", wanted)
    table.add_row("  errors", str(len(carried.errors)), "0")
    return table
