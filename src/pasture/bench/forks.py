"""`pasture bench forks`: a conversation of 2,000 tokens into 32 branches, which then go on together.

    one session is computed; one call forks it; cells are counted before and after; then each branch is asked something

The live cache holds the conversation all the while (`--kv-layout unified`, and nothing rests), so what a branch knows beyond
its own question must come from cells that it shares. Times are the client's, a connection a call. One event loop.
"""

from __future__ import annotations

import asyncio
import json
import urllib.request
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

from pasture.bench import counters as count
from pasture.bench.answering import Answer, run_and_answer
from pasture.bench.client import Chat, Endpoint, chat
from pasture.bench.corpus import passage
from pasture.bench.options import BenchOptions
from pasture.bench.report import seconds
from pasture.bench.systems import PASTURE, Size, SystemFailed, running, variants

CONVERSATION_TOKENS = 2000
BRANCHES = 32
ROUNDS = 9
"""calls that fork; the branches of the last go on"""
REPLY_TOKENS = 16
COUNTED_SECONDS = 1.0
"""until the server's own counters are up to date"""
LIMIT_SECONDS = 0.010
FLAGS = ("--kv-layout", "unified", "--idle-live", "1h", "--no-turn-ahead")


@dataclass(frozen=True, slots=True)
class Forked:
    prompt_tokens: int
    fork_seconds: tuple[float, ...]
    """of each call, 32 branches each"""
    extra_cells: int
    """that forking took, all calls together"""
    together_seconds: float
    """until all branches of the last call had answered"""
    cached_tokens: int
    """of a branch's prompt, median"""
    cells_after: int
    """that the branches' questions and replies took"""


def main(options: BenchOptions) -> int:
    """Exit status: 0 when measured and forking took no cell."""
    return run_and_answer("forks", options, _measure)


async def _measure(options: BenchOptions, folder: Path, console: Console) -> Answer:
    own = replace(options, serve_flags=(*FLAGS, "--state", str(folder / "state.sqlite"), *options.serve_flags))
    system = variants(PASTURE, Size(BRANCHES, 2 * CONVERSATION_TOKENS, options.cells), own)[0]
    async with running(system, folder / "forks.log") as up:
        found = await measure(up.system.endpoint, up.model, options)
    return Answer({"forked": asdict(found)}, [table(found)], 1 if found.extra_cells else 0)


async def measure(endpoint: Endpoint, model: str, options: BenchOptions) -> Forked:
    """All of it. Raises SystemFailed when the server does not answer as it must."""
    text = "You know this text.\n\n" + passage(Random(options.seed), CONVERSATION_TOKENS)
    said = ({"role": "system", "content": text}, {"role": "user", "content": "Shall we begin?"})
    first = await chat(endpoint, Chat("", said, REPLY_TOKENS, model), timeout_seconds=options.request_timeout)
    if first.error is not None:
        raise SystemFailed(first.error)
    origin = await _post(endpoint, "/v1/sessions", {"messages": [*said, {"role": "assistant", "content": first.reply}]})
    before = await _used_cells(endpoint)
    times: list[float] = []
    branches: dict[str, Any] = {}
    for _ in range(ROUNDS):
        started = perf_counter()
        branches = await _post(endpoint, f"/v1/sessions/{origin['id']}/fork", {"n": BRANCHES})
        times.append(perf_counter() - started)
    after = await _used_cells(endpoint)
    started = perf_counter()
    sessions = [str(branch["id"]) for branch in branches["data"]]
    usages = await asyncio.gather(*(_go_on(endpoint, model, name, number) for number, name in enumerate(sessions)))
    ended = perf_counter()
    return Forked(
        prompt_tokens=first.prompt_tokens or 0,
        fork_seconds=tuple(times),
        extra_cells=after - before,
        together_seconds=ended - started,
        cached_tokens=round(median(usages)),
        cells_after=await _used_cells(endpoint) - after,
    )


async def _go_on(endpoint: Endpoint, model: str, session_id: str, number: int) -> int:
    """Ask one branch something; how much of its prompt was there."""
    question = {"role": "user", "content": f"Question {number}: what comes next?"}
    body = {"model": model, "messages": [question], "session_id": session_id, "max_tokens": REPLY_TOKENS, "temperature": 0}
    answer = await _post(endpoint, "/v1/chat/completions", body)
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


async def _used_cells(endpoint: Endpoint) -> int:
    await asyncio.sleep(COUNTED_SECONDS)
    return round((await count.counters(endpoint))[count.USED_CELLS])


async def _post(endpoint: Endpoint, path: str, body: object) -> dict[str, Any]:
    return await asyncio.to_thread(_exchange, endpoint, path, json.dumps(body).encode())


def _exchange(endpoint: Endpoint, path: str, data: bytes) -> dict[str, Any]:
    request = urllib.request.Request(endpoint.url + path, data, {"content-type": "application/json"}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=600.0) as answer:
            found: dict[str, Any] = json.loads(answer.read())
            return found
    except OSError as error:
        raise SystemFailed(f"{path}: {error}") from None


def table(found: Forked) -> Table:
    made = Table(title=f"a conversation of {found.prompt_tokens:,} tokens, forked into {BRANCHES} branches")
    for heading in ("", "measured", "wanted"):
        made.add_column(heading, justify="left" if not heading else "right")
    calls = f"one call, median of {len(found.fork_seconds)}"
    made.add_row(calls, seconds(median(found.fork_seconds)), f"below {LIMIT_SECONDS * 1000:.0f} ms")
    made.add_row("the slowest of them", seconds(max(found.fork_seconds)), "")
    made.add_row("cells that forking took", f"{found.extra_cells:,}", "0")
    made.add_row(f"all {BRANCHES} answered, {REPLY_TOKENS} tokens each", seconds(found.together_seconds), "")
    made.add_row("known of a branch's prompt", f"{found.cached_tokens:,} tokens", "")
    made.add_row("cells that the branches took", f"{found.cells_after:,}", "")
    return made
