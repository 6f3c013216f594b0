"""`pasture bench remote`: a prompt that one server has computed, at another one with a shared store between them.

    recomputed   a prompt of about 2,000 tokens that nobody has seen, at the second server
    here         another such prompt, at the first server, which writes it to the store behind the answer
    restored     the same prompt at the second server; then again at the first; both replies have to agree: see `agreement`

Once with a Redis and once with a Mooncake pool over TCP, each started for this on a port of loopback and ended afterwards; one
that is not installed is named and left out. One machine: what a network would add is not in the figures. One event loop, in
the caller's thread.
"""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from statistics import median

from rich.console import Console
from rich.table import Table

from pasture.bench.agreement import TOP_LOGPROBS, agree, gap, told
from pasture.bench.answering import Answer, run_and_answer
from pasture.bench.client import Chat, Exchange, Message, call_json, chat
from pasture.bench.corpus import passage
from pasture.bench.options import BenchOptions
from pasture.bench.report import seconds
from pasture.bench.systems import PASTURE, Running, Size, SystemFailed, free_port, running, variants

PROMPT_TOKENS = 2000
ROUNDS = 3
"""prompts a run and store, each of its own text"""
STORES = ("redis", "mooncake")
START_SECONDS = 20.0
SENDING_SECONDS = 60.0
"""until what was computed is in the store"""
QUIET_SECONDS = 1.0
"""without a further byte written: all of it is there"""
POOL = "512MiB"
"""that each server lends to Mooncake"""

_QUESTION = "Which part of all this should a colleague who is new to Python read first?"


@dataclass(frozen=True, slots=True)
class Round:
    """One prompt through one store; seconds to the first token."""

    store: str
    recomputed_seconds: float
    here_seconds: float
    restored_seconds: float
    prompt_tokens: int
    cached_tokens: int
    """of the restored prompt, what came from the store"""
    written_bytes: int
    gap_nats: float
    """how far apart the tokens are at which the two servers' replies part; 0 for equal replies"""

    @property
    def ratio(self) -> float:
        """How many times sooner."""
        return self.recomputed_seconds / self.restored_seconds


def main(options: BenchOptions) -> int:
    """Exit status: 0 when measured, 1 when a server failed or answered differently, or when there is no store to measure."""
    return run_and_answer("remote", options, _measure)


async def _measure(options: BenchOptions, folder: Path, console: Console) -> Answer:
    rounds: list[Round] = []
    for name in STORES:
        command = store_command(name)
        if command is None:
            console.print(f"{name} is not installed here: left out", style="yellow")
            continue
        async with AsyncExitStack() as stack:
            url = await stack.enter_async_context(_store(name, command, folder / f"{name}.log"))
            logs = [folder / f"{name}-{which}.log" for which in ("here", "there")]
            here, there = [await stack.enter_async_context(_server(options, url, log)) for log in logs]
            for number in range(ROUNDS * options.repeat):
                console.print(f"{name}: prompt {number + 1} of {ROUNDS * options.repeat}", style="dim")
                rounds.append(await one_round(name, here, there, options, number))
    found = {
        "rounds": [asdict(made) | {"ratio": made.ratio} for made in rounds],
        "ratios": {name: ratio(rounds, name) for name in stores_of(rounds)},
    }
    held = agree([made.gap_nats for made in rounds]) and all(made.cached_tokens > 0 for made in rounds)
    return Answer(found, [table(rounds)], 0 if held else 1)


async def one_round(store: str, here: Running, there: Running, options: BenchOptions, number: int) -> Round:
    """One prompt. Raises SystemFailed when a server does not answer, or does not write to the store."""
    strange, shared = (_prompt(options.seed * 1000 + 2 * number + which) for which in (0, 1))
    recomputed = await _ask(there, strange, options)
    await _sent(there, 0)
    before = await _written(here)
    first = await _ask(here, shared, options)
    written = await _sent(here, before)
    restored = await _ask(there, shared, options)
    stayed = await _ask(here, shared, options)
    return Round(
        store=store,
        recomputed_seconds=recomputed.ttft_seconds,
        here_seconds=first.ttft_seconds,
        restored_seconds=restored.ttft_seconds,
        prompt_tokens=restored.prompt_tokens or 0,
        cached_tokens=restored.cached_tokens or 0,
        written_bytes=written - before,
        gap_nats=gap(restored, stayed),
    )


def stores_of(rounds: Sequence[Round]) -> list[str]:
    return list(dict.fromkeys(made.store for made in rounds))


def ratio(rounds: Sequence[Round], store: str) -> float:
    """Median over the prompts of how many times sooner the first token comes."""
    return median(made.ratio for made in rounds if made.store == store)


def table(rounds: Sequence[Round]) -> Table:
    """A row a store, medians."""
    made = Table(title="a prompt that another server has computed, medians")
    for heading in ("store", "recomputed", "restored", "of recomputed", "known tokens", "in the store", "same replies"):
        made.add_column(heading, justify="left" if heading == "store" else "right")
    for name in stores_of(rounds):
        mine = [each for each in rounds if each.store == name]
        made.add_row(
            name,
            seconds(median(each.recomputed_seconds for each in mine)),
            seconds(median(each.restored_seconds for each in mine)),
            f"1/{ratio(mine, name):.0f}",
            f"{median(each.cached_tokens for each in mine):,.0f} of {median(each.prompt_tokens for each in mine):,.0f}",
            f"{median(each.written_bytes for each in mine) / 2**20:.1f} MiB",
            told([each.gap_nats for each in mine]),
        )
    return made


def store_command(name: str) -> tuple[str, ...] | None:
    """How to start the store, without its port; None where it is not installed."""
    if name == "redis":
        binary = shutil.which("redis-server")
        there = binary is not None and importlib.util.find_spec("redis") is not None
        return (str(binary), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--port") if there else None
    master = Path(sys.executable).with_name("mooncake_master")
    options = ("-rpc_address=127.0.0.1", "-metrics_host=127.0.0.1", f"-metrics_port={free_port()}", "-rpc_port")
    return (str(master), *options) if master.exists() else None


@asynccontextmanager
async def _store(name: str, command: Sequence[str], log: Path) -> AsyncGenerator[str]:
    """The store's URL, while it runs."""
    port = free_port()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen([*command, str(port)], stdout=output, stderr=subprocess.STDOUT)  # noqa: ASYNC220 - quick
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemFailed(f"{name} did not start: see {log}")
            await asyncio.sleep(0.05)
        yield f"redis://127.0.0.1:{port}" if name == "redis" else f"mooncake://127.0.0.1:{port}?share={POOL}"
    finally:
        process.kill()
        await asyncio.to_thread(process.wait)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@asynccontextmanager
async def _server(options: BenchOptions, url: str, log: Path) -> AsyncGenerator[Running]:
    options = replace(options, serve_flags=("--kv-remote", url, *options.serve_flags))
    system = variants(PASTURE, Size(1, 2 * PROMPT_TOKENS, options.cells), options)[0]
    async with running(system, log) as up:
        await _ask(up, (_user("0123456789"),), options)
        yield up


async def _ask(up: Running, messages: tuple[Message, ...], options: BenchOptions) -> Exchange:
    request = Chat("Ada", messages, options.max_tokens, up.model, TOP_LOGPROBS)
    exchange = await chat(up.system.endpoint, request, timeout_seconds=options.request_timeout)
    if exchange.error is not None:
        raise SystemFailed(f"{up.system.label}: {exchange.error}")
    return exchange


async def _sent(up: Running, before: int) -> int:
    """Wait until the server has written what it computed to the store; the bytes it has written since its start."""
    deadline = time.monotonic() + SENDING_SECONDS
    written, since = await _written(up), time.monotonic()
    while written == before or time.monotonic() - since < QUIET_SECONDS:
        if time.monotonic() > deadline:
            raise SystemFailed(f"{up.system.label} writes nothing to the shared store")
        await asyncio.sleep(0.1)
        if (now := await _written(up)) != written:
            written, since = now, time.monotonic()
    return written


async def _written(up: Running) -> int:
    """Bytes that the server has written to the shared store."""
    props = await call_json(up.system.endpoint, "/props")
    store = props.get("store") if props is not None else None
    tiers = store.get("tiers") if isinstance(store, dict) else None
    for tier in tiers if isinstance(tiers, list) else ():
        if isinstance(tier, dict) and tier.get("name") == "remote":
            return int(str(tier.get("written_bytes", 0)))
    raise SystemFailed(f"{up.system.label} shows no remote tier")


def _prompt(seed: int) -> tuple[Message, ...]:
    text = "You know this text.\n\n" + passage(Random(seed), PROMPT_TOKENS)
    return ({"role": "system", "content": text}, _user(_QUESTION))


def _user(text: str) -> Message:
    return {"role": "user", "content": text}
