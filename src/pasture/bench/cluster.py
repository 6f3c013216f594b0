"""`pasture cluster bench`: what a second replica brings, what the way through an ingress costs, what the shared pool saves.

    scaling     a closed loop of people on 1 and on 2 replicas, engines asleep as long as a real one would compute
    overhead    a one-token reply through an ingress, and from a server alone with the same engine, in turns
    restoring   a prompt of 2,000 tokens computed on one replica; then that one gets nothing more, and another one is asked

The first two need no model; the third wants one, and a remote tier. Everything runs on this machine over loopback and HTTP, and
the sleeping engines stand for machines of their own. Ends what it starts. One event loop, in the caller's thread.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from pasture.bench.client import Endpoint, Json, call, call_json
from pasture.bench.cluster_process import ClusterFailed, ClusterProcess
from pasture.bench.systems import free_port

PACE = "0.02,0.0002"
"""seconds a step, and a token of a prompt"""
RUNNING = 4
"""at once on a replica"""
PEOPLE = 24
PROMPT_TOKENS, REPLY_TOKENS = 200, 24
WARM_SECONDS = 3.0
CALLS = 200
LONG_TOKENS = 2000
WAIT_SECONDS = 120.0
_FLAGS = ("--fake-engine", "--fake-pace", PACE, "-np", str(RUNNING), "-c", "32768", "--kv-layout", "unified")


@dataclass(frozen=True, slots=True)
class Scaling:
    replies_per_second: tuple[float, float]
    """of one replica and of two"""

    @property
    def ratio(self) -> float:
        return self.replies_per_second[1] / self.replies_per_second[0]


@dataclass(frozen=True, slots=True)
class Restoring:
    """Medians, seconds until the first token."""

    computed_seconds: float
    restored_seconds: float
    cached_tokens: int
    """of the prompt, the least that was found"""


async def measure(seconds: float, console: Console) -> tuple[Scaling, float]:
    """Scaling, and the overhead of an ingress in seconds (difference of medians)."""
    with tempfile.TemporaryDirectory() as folder, closing(ClusterProcess(Path(folder), *_FLAGS, replicas=1, ingresses=1)) as up:
        console.print("one replica ...", style="dim")
        alone = await _throughput(up.endpoint, seconds, first=0)
        with _server(Path(folder)) as direct:
            overhead = await _overhead(up.endpoint, direct)
        console.print("two replicas ...", style="dim")
        await asyncio.to_thread(up.run, "scale", "2")
        await up.until(lambda found: len(found) == 2)
        both = await _throughput(up.endpoint, seconds, first=1 << 20)
    return Scaling((alone, both)), overhead


async def measure_restoring(model: str, remote: str, flags: tuple[str, ...], repeats: int, console: Console) -> Restoring:
    """What the pool that replicas share saves. Raises ClusterFailed."""
    computed, restored, cached = [], [], []
    own = ("-m", model, "--kv-remote", remote, "-c", "8192", *flags)
    with tempfile.TemporaryDirectory() as folder, closing(ClusterProcess(Path(folder), *own, ingresses=1)) as up:
        for repeat in range(repeats):
            await up.until(lambda found: len(found) == 2, WAIT_SECONDS)
            for warm in range(4):
                await _first_token(up.endpoint, _tokens(100 * repeat + warm + 50, 40))
            prompt = _tokens(repeat, LONG_TOKENS)
            before = {str(one["replica"]): int(str(one["known_blocks"])) for one in await up.replicas()}
            written = await _written_bytes(up.admin)
            seconds, _ = await _first_token(up.endpoint, prompt)
            computed.append(seconds)
            await _until_stored(up.admin, written)
            grown = await up.until(lambda found, known=before: any(_growth(one, known) > 16 for one in found))  # type: ignore[misc]
            owner = max(grown, key=lambda one: _growth(one, before))
            await asyncio.to_thread(up.run, "cordon", str(owner["replica"]))
            seconds, found = await _first_token(up.endpoint, prompt)
            os.kill(int(str(owner["pid"])), signal.SIGKILL)
            await up.until(lambda found, dead=owner: dead["epoch"] not in {one["epoch"] for one in found})  # type: ignore[misc]
            restored.append(seconds)
            cached.append(found)
            console.print(
                f"computed {computed[-1]:.2f} s, restored elsewhere {seconds:.3f} s, {found} tokens found", style="dim"
            )
    return Restoring(median(computed), median(restored), min(cached))


def report(scaling: Scaling, overhead: float, console: Console) -> None:
    table = Table("", "measured", "asked", box=None)
    one, two = scaling.replies_per_second
    table.add_row("one replica", f"{one:.1f} replies/s", "")
    table.add_row("two replicas", f"{two:.1f} replies/s", "")
    table.add_row("two against one", f"{scaling.ratio:.2f}x", "at least 1.9x")
    table.add_row("through an ingress, p50", f"+{overhead * 1000:.2f} ms", "at most 2 ms")
    console.print(table)
    console.print(f"Fake engines asleep for {PACE} s a step and a prompt token; loopback; one machine.", style="dim")


def report_restoring(found: Restoring, console: Console) -> None:
    table = Table("", "measured", "asked", box=None)
    table.add_row(f"first token of {LONG_TOKENS} tokens, computed", f"{found.computed_seconds:.2f} s", "")
    table.add_row("the same on another replica", f"{found.restored_seconds:.3f} s", "")
    table.add_row("tokens found there", str(found.cached_tokens), f"{LONG_TOKENS - 1}")
    table.add_row("a fraction of", f"1/{found.computed_seconds / found.restored_seconds:.0f}", "at most 1/20")
    console.print(table)


async def _throughput(endpoint: Endpoint, seconds: float, *, first: int) -> float:
    """Replies a second of a closed loop, all prompts different."""
    numbers = itertools.count(first)
    ended: list[float] = []
    started = time.perf_counter()
    until = started + WARM_SECONDS + seconds

    async def person() -> None:
        while time.perf_counter() < until:
            await _complete(endpoint, _tokens(next(numbers), PROMPT_TOKENS), REPLY_TOKENS)
            ended.append(time.perf_counter())

    await asyncio.gather(*(person() for _ in range(PEOPLE)))
    return sum(started + WARM_SECONDS <= at < until for at in ended) / seconds


async def _overhead(ingress: Endpoint, direct: Endpoint) -> float:
    taken: dict[str, list[float]] = {ingress.url: [], direct.url: []}
    for number in range(CALLS):
        for endpoint in (ingress, direct):
            started = time.perf_counter()
            await _complete(endpoint, _tokens(number % 4, 40), 1)
            taken[endpoint.url].append(time.perf_counter() - started)
    return median(taken[ingress.url][20:]) - median(taken[direct.url][20:])


async def _complete(endpoint: Endpoint, prompt: list[int], max_tokens: int) -> None:
    body: Any = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    status, data = await call(endpoint, "/v1/completions", body, timeout_seconds=WAIT_SECONDS)
    if status != 200:
        raise ClusterFailed(f"a request failed: {data.decode(errors='replace')}")


async def _first_token(endpoint: Endpoint, prompt: list[int]) -> tuple[float, int]:
    """Seconds for a reply of one token, and how much of the prompt was found."""
    body: Any = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    started = time.perf_counter()
    answer = await call_json(endpoint, "/v1/completions", body, timeout_seconds=WAIT_SECONDS)
    seconds = time.perf_counter() - started
    if answer is None:
        raise ClusterFailed("a request failed")
    usage = cast(dict[str, Any], answer["usage"])
    return seconds, int((usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0))


async def _written_bytes(admin: Endpoint) -> int:
    """To the tiers behind RAM, by all replicas together."""
    props = await call_json(admin, "/props")
    tiers = cast(dict[str, Any], props["store"])["tiers"] if props is not None else []
    return sum(int(tier["written_bytes"]) for tier in tiers if tier["name"] != "ram")


async def _until_stored(admin: Endpoint, before: int) -> None:
    """Wait until what was computed has left for the pool: until more is there, and nothing follows."""
    deadline, last = time.monotonic() + WAIT_SECONDS, before
    while time.monotonic() < deadline:
        await asyncio.sleep(1.5)
        now = await _written_bytes(admin)
        if now == last and now > before:
            return
        last = now
    raise ClusterFailed("nothing arrives in the remote tier")


def _growth(one: Json, before: Mapping[str, int]) -> int:
    return int(str(one["known_blocks"])) - before.get(str(one["replica"]), 0)


def _tokens(number: int, n: int) -> list[int]:
    """A prompt of its own for each number; valid for every vocabulary."""
    return Random(number).choices(range(100, 250), k=n)


@contextmanager
def _server(folder: Path) -> Iterator[Endpoint]:
    """A server alone with the same engine."""
    port = free_port()
    command = [sys.executable, "-m", "pasture", "serve", "--port", str(port), *_FLAGS]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while b"serves at" not in (folder / "server.log").read_bytes():
            if time.monotonic() > deadline or process.poll() is not None:
                raise ClusterFailed("the server alone did not start")
            time.sleep(0.1)
        yield Endpoint.parse(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(WAIT_SECONDS)
