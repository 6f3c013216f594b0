"""`pasture bench import`: what a conversation costs that goes on at another server, against going on where it is.

    here     a conversation of about 2,000 tokens is computed; it is exported, then its owner goes on
    there    a second server of the same kind imports the file; the owner goes on there, with the very same words

Both wait the same time before the next turn, and take turns in being first, so that whatever else the machine does falls on
both. Both must agree, see `agreement`. Then a file with one byte changed, and a server with another kind of cache: both
must refuse, or the benchmark fails. One event loop, in the caller's thread.
"""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter

from rich.console import Console
from rich.table import Table

from pasture.bench.agreement import TOP_LOGPROBS, agree, gap, told
from pasture.bench.answering import Answer, run_and_answer
from pasture.bench.client import Chat, Endpoint, Exchange, Message, chat
from pasture.bench.corpus import passage
from pasture.bench.options import BenchOptions
from pasture.bench.report import seconds
from pasture.bench.systems import PASTURE, Running, Size, SystemFailed, running, variants

CONVERSATION_TOKENS = 2000
ROUNDS = 5
"""conversations a run, each of its own text"""
PAUSE_SECONDS = 1.5
"""a person reads; a server does meanwhile whatever it does when nobody asks"""
OTHER_CACHE = ("--cache-type-k", "q8_0", "--cache-type-v", "q8_0")

_FIRST = "Which part of all this should a colleague who is new to Python read first?"
_SECOND = "And what comes after that?"


@dataclass(frozen=True, slots=True)
class Round:
    """One conversation."""

    here_seconds: float
    """to the first token of the next turn, where the conversation was"""
    there_seconds: float
    export_seconds: float
    import_seconds: float
    file_bytes: int
    prompt_tokens: int
    here_cached_tokens: int
    there_cached_tokens: int
    gap_nats: float
    """how far apart the tokens are at which the two replies part; 0 for equal replies"""


@dataclass(frozen=True, slots=True)
class Refusal:
    """How a file that must not be taken was answered."""

    what: str
    status: int
    message: str


def main(options: BenchOptions) -> int:
    """Exit status: 0 when measured, 1 when a server failed, answered differently, or took what it must refuse."""
    return run_and_answer("import", options, _measure)


async def _measure(options: BenchOptions, folder: Path, console: Console) -> Answer:
    async with AsyncExitStack() as stack:
        here, there = [await stack.enter_async_context(_server(options, folder / f"{name}.log")) for name in ("here", "there")]
        rounds, file = [], b""
        for number in range(ROUNDS * options.repeat):
            console.print(f"conversation {number + 1} of {ROUNDS * options.repeat}", style="dim")
            made, file = await one_round(here, there, options, number)
            rounds.append(made)
        refusals = [await _refused(there, "one byte changed", file[:-1000] + bytes([file[-1000] ^ 1]) + file[-999:])]
        other = replace(options, serve_flags=(*options.serve_flags, *OTHER_CACHE))
        async with _server(other, folder / "other.log") as different:
            refusals.append(await _refused(different, "another quantisation", file))
    found = {
        "rounds": [asdict(made) for made in rounds],
        "ratio": ratio(rounds),
        "refusals": [asdict(refusal) for refusal in refusals],
    }
    held = agree([made.gap_nats for made in rounds]) and all(400 <= refusal.status < 500 for refusal in refusals)
    return Answer(found, [table(rounds, refusals)], 0 if held else 1)


async def one_round(here: Running, there: Running, options: BenchOptions, number: int) -> tuple[Round, bytes]:
    """One conversation, and its file. Raises SystemFailed when a server does not answer as it must."""
    opening = "You know this text.\n\n" + passage(Random(options.seed * 1000 + number), CONVERSATION_TOKENS)
    messages: tuple[Message, ...] = ({"role": "system", "content": opening}, {"role": "user", "content": _FIRST})
    first = await _ask(here, messages, options)
    said = (*messages, {"role": "assistant", "content": first.reply})
    made = json.loads(await _post(here.system.endpoint, "/v1/sessions", json.dumps({"messages": said}).encode(), 201))
    started = perf_counter()
    file = await _post(here.system.endpoint, f"/v1/sessions/{made['id']}/export", b"", 200)
    exported = perf_counter()
    await _post(there.system.endpoint, "/v1/sessions/import", file, 201)
    imported = perf_counter()
    turn = (*said, {"role": "user", "content": _SECOND})
    asked: dict[str, Exchange] = {}
    for name, server in (("here", here), ("there", there))[:: 1 if number % 2 else -1]:
        await asyncio.sleep(PAUSE_SECONDS)
        asked[name] = await _ask(server, turn, options)
    stayed, went = asked["here"], asked["there"]
    return Round(
        here_seconds=stayed.ttft_seconds,
        there_seconds=went.ttft_seconds,
        export_seconds=exported - started,
        import_seconds=imported - exported,
        file_bytes=len(file),
        prompt_tokens=stayed.prompt_tokens or 0,
        here_cached_tokens=stayed.cached_tokens or 0,
        there_cached_tokens=went.cached_tokens or 0,
        gap_nats=gap(stayed, went),
    ), file


def ratio(rounds: list[Round]) -> float:
    """Median over the conversations of the wait there to the wait here."""
    return median(made.there_seconds / made.here_seconds for made in rounds)


def table(rounds: list[Round], refusals: list[Refusal]) -> Table:
    """Medians, and what was refused."""
    tokens = round(median(made.prompt_tokens for made in rounds))
    made = Table(title=f"the next turn of {len(rounds)} conversations of {tokens:,} tokens, medians", show_header=False)
    made.add_column()
    made.add_column(justify="right")

    def middle(name: str) -> float:
        return median(float(getattr(one, name)) for one in rounds)

    made.add_row("first token where the conversation was", seconds(middle("here_seconds")))
    made.add_row("first token where it was imported", seconds(middle("there_seconds")))
    made.add_row("ratio, conversation by conversation", f"{ratio(rounds):.2f}")
    made.add_row("known tokens, here and there", f"{middle('here_cached_tokens'):,.0f}, {middle('there_cached_tokens'):,.0f}")
    made.add_row("export, import", f"{seconds(middle('export_seconds'))}, {seconds(middle('import_seconds'))}")
    made.add_row("file", f"{middle('file_bytes') / 2**20:.1f} MiB")
    made.add_row("same replies", told([one.gap_nats for one in rounds]), end_section=True)
    for refusal in refusals:
        made.add_row(f"{refusal.what}: {refusal.status}", refusal.message)
    return made


@asynccontextmanager
async def _server(options: BenchOptions, log: Path) -> AsyncGenerator[Running]:
    system = variants(PASTURE, Size(1, 2 * CONVERSATION_TOKENS, options.cells), options)[0]
    async with running(system, log) as up:
        await _ask(up, ({"role": "user", "content": "0123456789"},), options)
        yield up


async def _ask(up: Running, messages: tuple[Message, ...], options: BenchOptions) -> Exchange:
    request = Chat("Ada", messages, options.max_tokens, up.model, TOP_LOGPROBS)
    exchange = await chat(up.system.endpoint, request, timeout_seconds=options.request_timeout)
    if exchange.error is not None:
        raise SystemFailed(f"{up.system.label}: {exchange.error}")
    return exchange


async def _post(endpoint: Endpoint, path: str, data: bytes, status: int) -> bytes:
    found, body = await asyncio.to_thread(_exchange, endpoint, path, data)
    if found != status:
        raise SystemFailed(f"{path} answered {found}: {body[:300].decode(errors='replace')}")
    return body


async def _refused(up: Running, what: str, file: bytes) -> Refusal:
    status, body = await asyncio.to_thread(_exchange, up.system.endpoint, "/v1/sessions/import", file)
    return Refusal(what, status, json.loads(body)["error"]["message"] if status >= 400 else "taken")


def _exchange(endpoint: Endpoint, path: str, data: bytes) -> tuple[int, bytes]:
    """Blocks; for bodies that are no JSON, whose time is not measured to the token."""
    request = urllib.request.Request(endpoint.url + path, data=data, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=120.0) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
