"""`pasture bench restart`: how long a known conversation waits for its first token after the server was restarted.

    cold         a conversation of about 2,000 tokens, never seen before; then the server is ended as a service manager would
    next turn    started again: its owner goes on
    same         started again: the very same request
    another      started again: somebody else with the same system prompt
    both         started again: its owner and somebody else in the same instant; the wait of the one who waited longer

Each line is the first request of a fresh start, after a warm-up that shares nothing with it, on the state that the cold run
left: what later phases add is put away again. llama-server keeps a slot only if somebody saves it before the end and restores
it after the start: the benchmark does both for it, for every slot. One event loop, in the caller's thread.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from statistics import median

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from pasture.bench.answering import Answer, run_and_answer
from pasture.bench.client import Chat, Endpoint, Exchange, Message, call, chat
from pasture.bench.corpus import passage
from pasture.bench.options import BenchOptions
from pasture.bench.report import seconds
from pasture.bench.run import progress_bar
from pasture.bench.systems import PASTURE, Running, Size, System, SystemFailed, repack_survives, running, variants
from pasture.core.errors import ConfigError

SYSTEM_TOKENS = 2080
LONGEST_TOKENS = 2560
SLOTS = 2
SHORT_REPLY_TOKENS = 4
"""of what is asked after a restart: only the first one is timed"""
COLD, NEXT_TURN, SAME, ANOTHER, BOTH = "cold", "next turn", "same request", "another user", "both at once"
PHASES = (COLD, NEXT_TURN, SAME, ANOTHER, BOTH)

_FIRST = "Which part of all this should a colleague who is new to Python read first, and what should they leave for later?"
_SECOND = "And what comes after that?"
_OTHERS = "Which of these things would you rather not use in new code?"


@dataclass(frozen=True, slots=True)
class Wait:
    """One phase of one run: seconds to the first token of whoever waited longest, and the tokens that were still known."""

    system: str
    phase: str
    ttft_seconds: float
    prompt_tokens: int
    cached_tokens: int


def main(options: BenchOptions) -> int:
    """Exit status: 0 when measured, 1 when a system could not be."""
    return run_and_answer("restart", options, _measure)


async def _measure(options: BenchOptions, folder: Path, console: Console) -> Answer:
    if any(peer != "llama-server" for peer in options.against):
        raise ConfigError("restart starts and ends its systems: only llama-server can be compared with")
    repack = await repack_survives(options, folder) if options.against else False
    waits: list[Wait] = []
    with progress_bar(console) as progress:
        for number in range(options.repeat):
            for system, state in systems(options, folder / f"state-{number + 1}", repack=repack):
                waits += await measure(system, state, options, progress, f"{system.label}, run {number + 1}")
    found = {"waits": [asdict(wait) for wait in waits]}
    return Answer(found, [table(waits)])


def systems(options: BenchOptions, state: Path, *, repack: bool) -> list[tuple[System, Path]]:
    """pasture, and what it is compared with, each with a directory of its own in `state` that outlives it."""
    size = Size(SLOTS, LONGEST_TOKENS, options.cells)
    cache = _private(state / "pasture")
    ours = variants(PASTURE, size, replace(options, serve_flags=("--kv-cache", str(cache), *options.serve_flags)))
    found = [(system, cache) for system in ours]
    theirs = [system for peer in options.against for system in variants(peer, size, options, repack=repack)]
    for index, system in enumerate(theirs):
        slots = _private(state / f"slots-{index + 1}")
        found.append((replace(system, command=(*system.command, "--slot-save-path", f"{slots}/")), slots))
    return found


async def measure(system: System, state: Path, options: BenchOptions, progress: Progress, label: str) -> list[Wait]:
    """Every phase once. Raises SystemFailed when a request is not answered."""
    task = progress.add_task(label, total=len(PHASES))
    opening: Message = {"role": "system", "content": "You know this text.\n\n" + passage(Random(options.seed), SYSTEM_TOKENS)}
    first = (opening, _user(_FIRST))
    waits = []
    log = state.with_suffix(".log")
    async with _fresh(system, options, log) as up:
        asked = await _ask(up, options, {"Ada": first})
        waits.append(wait(system.label, COLD, asked))
        await _all_slots(system, "save")
        progress.advance(task)
    kept = state.with_suffix(".kept")
    shutil.copytree(state, kept)
    said: Message = {"role": "assistant", "content": asked[0].reply}
    again: dict[str, tuple[Message, ...]] = {"Ada": (*first, said, _user(_SECOND))}
    somebody_else: dict[str, tuple[Message, ...]] = {"Bruno": (opening, _user(_OTHERS))}
    brief = replace(options, max_tokens=SHORT_REPLY_TOKENS)
    phases: dict[str, dict[str, tuple[Message, ...]]] = {
        NEXT_TURN: again,
        SAME: {"Ada": first},
        ANOTHER: somebody_else,
        BOTH: again | somebody_else,
    }
    for phase, requests in phases.items():
        shutil.rmtree(state)
        shutil.copytree(kept, state)
        async with _fresh(system, options, log) as up:
            await _all_slots(system, "restore")
            waits.append(wait(system.label, phase, await _ask(up, brief, requests)))
            progress.advance(task)
    shutil.rmtree(kept)
    return waits


def wait(label: str, phase: str, exchanges: Sequence[Exchange]) -> Wait:
    """Of whoever waited longest."""
    slowest = max(exchanges, key=lambda exchange: exchange.ttft_seconds)
    return Wait(label, phase, slowest.ttft_seconds, slowest.prompt_tokens or 0, slowest.cached_tokens or 0)


def table(waits: Sequence[Wait]) -> Table:
    """One row a phase and system, medians over the runs; ratios are to the same system's cold start."""
    labels = list(dict.fromkeys(wait.system for wait in waits))
    runs = sum(wait.phase == COLD and wait.system == labels[0] for wait in waits)
    made = Table(title="time to the first token after a restart" + (f", medians of {runs} runs" if runs > 1 else ""))
    for heading in ("", "system", "first token", "of cold", "known tokens"):
        made.add_column(heading, justify="left" if heading in ("", "system") else "right")
    for phase in PHASES:
        for label in labels:
            cold, here = (_median(waits, label, which) for which in (COLD, phase))
            ratio = "" if phase == COLD else f"1/{cold.ttft_seconds / here.ttft_seconds:.0f}"
            known = f"{here.cached_tokens:,} of {here.prompt_tokens:,}"
            made.add_row(
                phase if label == labels[0] else "",
                label,
                seconds(here.ttft_seconds),
                ratio,
                known,
                end_section=label == labels[-1],
            )
    return made


def _median(waits: Sequence[Wait], label: str, phase: str) -> Wait:
    chosen = [wait for wait in waits if (wait.system, wait.phase) == (label, phase)]
    return replace(chosen[-1], ttft_seconds=median(wait.ttft_seconds for wait in chosen))


@asynccontextmanager
async def _fresh(system: System, options: BenchOptions, log: Path) -> AsyncGenerator[Running]:
    async with running(system, log) as up:
        warm_up = ({"role": "system", "content": "~"}, _user("0123456789"))
        await _ask(up, replace(options, max_tokens=SHORT_REPLY_TOKENS), {"warm-up": warm_up})
        yield up


async def _ask(up: Running, options: BenchOptions, requests: Mapping[str, tuple[Message, ...]]) -> list[Exchange]:
    chats = [Chat(user, messages, options.max_tokens, up.model) for user, messages in requests.items()]
    asked = [chat(up.system.endpoint, each, timeout_seconds=options.request_timeout) for each in chats]
    exchanges = await asyncio.gather(*asked)
    for exchange in exchanges:
        if exchange.error is not None:
            raise SystemFailed(f"{up.system.label}: {exchange.error}")
    return exchanges


async def _all_slots(system: System, action: str) -> None:
    """Save or restore what each slot of llama-server holds; a slot that holds nothing may refuse."""
    if system.peer == PASTURE:
        return
    answers = [await _slot(system.endpoint, slot, action) for slot in range(SLOTS)]
    if not any(answers):
        raise SystemFailed(f"{system.label}: no slot could be {action}d")


async def _slot(endpoint: Endpoint, slot: int, action: str) -> bool:
    status, _ = await call(endpoint, f"/slots/{slot}?action={action}", {"filename": f"slot-{slot}.bin"}, timeout_seconds=60)
    return status == 200


def _private(directory: Path) -> Path:
    """Made anew: what an earlier benchmark left there would be known from the beginning."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, mode=0o700)
    return directory


def _user(text: str) -> Message:
    return {"role": "user", "content": text}
