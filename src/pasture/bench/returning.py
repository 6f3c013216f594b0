"""`pasture bench returning`: how long those wait who come back after a while, with prefetch on and off.

    prepared once     `sessions` conversations of about `context` tokens of their own, each with one turn; they rest on disk
    every run         a server that finds them there, with RAM for `ram_for` of them and live cells for fewer still
    every user        thinks (log-normal, median `think`, logarithms `spread` apart), types, asks, reads, thinks ...

While they type, users send what the chat page sends: a hint at the first letter and with every complete word, with the draft so
far (`--no-hints`: nobody does). Hints go to both sides; the one with prefetch off answers and ignores them. Everybody is in the
middle of a pause when a run begins, and the first part of it is not counted. The disk's blocks are put out of the operating
system's cache first: that would be RAM for all. One event loop, in the caller's thread.
"""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import orjson
from rich.console import Console
from rich.progress import Progress

from pasture.bench import counters as count
from pasture.bench.client import Chat, Exchange, Json, Message, call, chat
from pasture.bench.corpus import passage, subjects
from pasture.bench.measure import Outside, figures
from pasture.bench.options import BenchOptions
from pasture.bench.results import Report, Run, traces
from pasture.bench.run import progress_bar
from pasture.bench.switched import Side, Switch, run_bench, serving
from pasture.bench.systems import Running, SystemFailed
from pasture.bench.workloads import TEMPLATE_TOKENS, rounded_cells

PREFETCH = Switch("prefetch", ("--prefetch",), ("--no-prefetch",))
SHORTEST_THINK_SECONDS = 2.0
TYPING_SHARE = 0.5
"""of a pause, its end, in which the next message is typed"""
LONGEST_TYPING_SECONDS = 20.0
HINT_SECONDS = 0.1
"""between two hints of one user, at least"""
UNCOUNTED_SHARE = 0.2
"""of a run, its beginning: RAM fills with what the run itself brings"""
PREPARED_AT_ONCE = 8
LIVE_SHARE = 0.4
"""of those that RAM has room for, how many the live cache has room for"""
MIN_CELLS = 4096

_FIRST = "What is this about?"
_QUESTIONS = ("What about {topic}?", "And how is {topic} used here?", "Tell me more about {topic}, in short.", "Why {topic}?")


@dataclass(frozen=True, slots=True)
class Pause:
    """What a user does between two turns."""

    think_seconds: float
    """until the first letter"""
    typing_seconds: float
    """from the first letter to sending"""


def pauses(rng: Random, median_seconds: float, spread: float) -> Iterator[Pause]:
    """One user's pauses. The first is what is left of one that began before the run."""
    first = True
    while True:
        whole = max(SHORTEST_THINK_SECONDS, median_seconds * math.exp(spread * rng.gauss(0, 1)))
        if first:
            # who looks at a random moment finds long pauses in proportion to their length
            whole = median_seconds * math.exp(spread * rng.gauss(spread, 1)) * rng.random()
            first = False
        typing = min(whole * TYPING_SHARE, LONGEST_TYPING_SECONDS)
        yield Pause(whole - typing, typing)


def drafts(question: str, typing_seconds: float) -> Iterator[tuple[float, str]]:
    """Hints while a question is typed: seconds after the first letter, and the text. Keys come evenly; the last one sends."""
    next_at = 0.0
    for n, letter in enumerate(question):
        at = typing_seconds * n / len(question)
        if at >= next_at and (n == 0 or letter.isspace() or letter in ".!?"):
            yield at, question[: n + 1]
            next_at = at + HINT_SECONDS


@dataclass(slots=True)
class Talk:
    """One conversation, as its client keeps it."""

    user: str
    messages: tuple[Message, ...]

    def ask(self, question: str) -> tuple[Message, ...]:
        return (*self.messages, {"role": "user", "content": question})

    def answered(self, exchange: Exchange) -> None:
        self.messages = (*exchange.chat.messages, {"role": "assistant", "content": exchange.reply})


def main(options: BenchOptions) -> int:
    """Exit status: 0 when measured, 1 when a system could not be or answered with errors."""
    return run_bench("returning", options, lambda folder, console: _measure(options, folder, console))


async def _measure(options: BenchOptions, folder: Path, console: Console) -> Report:
    options = replace(options, cells=_cells(options))
    state = folder / "prepared"
    with progress_bar(console) as progress:
        talks, cell_bytes = await _prepare(options, folder, state, progress)

        async def once(side: Side) -> Run:
            return await _run(side, options, folder, state, [Talk(t.user, t.messages) for t in talks], cell_bytes, progress)

        runs = await PREFETCH.alternate(options.repeat, once)
    title = (
        f"{options.sessions} sessions of about {options.context} tokens, RAM for {options.ram_for}, "
        f"{'with' if options.hints else 'without'} typing hints"
    )
    return PREFETCH.report(title, runs, options)


def _cells(options: BenchOptions) -> int:
    """Live cells for some of the sessions that RAM has room for."""
    longest = options.context + 10 * (4 * TEMPLATE_TOKENS + options.max_tokens)
    return rounded_cells(max(MIN_CELLS, int(options.ram_for * LIVE_SHARE) * longest))


async def _prepare(options: BenchOptions, folder: Path, state: Path, progress: Progress) -> tuple[list[Talk], int]:
    """Every session's first turn, on a server whose disk cache is left in `state`; and what a cell takes in bytes.

    What an earlier benchmark with the same folder and the same load has left there serves again.
    """
    talks = first_turns(options)
    known = folder / "prepared.json"
    load = {
        "model": str(options.model),
        "prompts": [talk.messages[0]["content"] for talk in talks],
        "reply": options.max_tokens,
    }
    found = kept(known, load)
    if found is not None:
        for talk, reply in zip(talks, found.replies, strict=True):
            talk.messages = (*talk.ask(_FIRST), {"role": "assistant", "content": reply})
        return talks, found.cell_bytes
    shutil.rmtree(state, ignore_errors=True)
    os.makedirs(state, mode=0o700)
    task = progress.add_task("preparing", total=len(talks))
    queue = list(reversed(talks))

    async def work(up: Running) -> None:
        while queue:
            talk = queue.pop()
            exchange = await _ask(up, talk, _FIRST, options)
            if exchange.error is not None:
                raise SystemFailed(f"the sessions could not be prepared: {exchange.error}")
            talk.answered(exchange)
            progress.advance(task)

    async with serving(Side("preparing", ("--kv-cache", str(state))), options, folder) as up:
        async with asyncio.TaskGroup() as group:
            for _ in range(PREPARED_AT_ONCE):
                group.create_task(work(up))
        cell_bytes = await count.cell_bytes(up.system.endpoint)
    known.write_bytes(orjson.dumps({"load": load, "replies": [t.messages[-1]["content"] for t in talks], "bytes": cell_bytes}))
    return talks, cell_bytes


def first_turns(options: BenchOptions) -> list[Talk]:
    """Sessions of which nothing is said yet but what they are about."""
    talks = []
    for number in range(options.sessions):
        text = passage(Random(f"returning-{options.seed}-{number}"), options.context)
        notes = f"The notes of user {number}, for nobody else.\n\n{text}"
        talks.append(Talk(f"user {number}", ({"role": "system", "content": notes},)))
    return talks


@dataclass(frozen=True, slots=True)
class Kept:
    """What preparing leaves behind, beside the blocks on disk."""

    replies: tuple[str, ...]
    cell_bytes: int


def kept(file: Path, load: Json) -> Kept | None:
    """What was prepared before for the same load; None where there is nothing."""
    if not file.exists():
        return None
    found = orjson.loads(file.read_bytes())
    return Kept(tuple(found["replies"]), int(found["bytes"])) if found["load"] == load else None


async def _run(
    side: Side, options: BenchOptions, folder: Path, state: Path, talks: list[Talk], cell_bytes: int, progress: Progress
) -> Run:
    task = progress.add_task(side.label, total=None)
    room = int(options.ram_for * cell_bytes * _mean_tokens(options))
    sized = Side(side.label, (*side.flags, "--kv-ram", str(room)))
    exchanges: list[Exchange] = []
    async with serving(sized, options, folder, state) as up:
        forget_files(folder / "cache")
        typist = Typist(up, hints=options.hints)
        before = await count.counters(up.system.endpoint)
        ends = time.perf_counter() + options.period
        starts = ends - options.period * (1 - UNCOUNTED_SHARE)

        async def user(number: int, talk: Talk) -> None:
            rng = Random(f"user-{options.seed}-{number}")
            for pause in pauses(rng, options.think, options.spread):
                question = rng.choice(_QUESTIONS).format(topic=rng.choice(subjects()))
                if time.perf_counter() + pause.think_seconds + pause.typing_seconds > ends:
                    return
                await asyncio.sleep(pause.think_seconds)
                await typist.type(talk, question, pause.typing_seconds)
                exchange = await _ask(up, talk, question, options)
                if exchange.sent >= starts:
                    exchanges.append(exchange)
                    progress.advance(task)
                if exchange.error is not None:
                    return
                talk.answered(exchange)

        async with asyncio.TaskGroup() as group:
            for number, talk in enumerate(talks):
                group.create_task(user(number, talk))
        after = await count.counters(up.system.endpoint)
        peak = None if up.memory is None else await up.memory.sample()
    if not exchanges:
        raise SystemFailed(f"nobody came back within {options.period:g} s: a longer --period, or a shorter --think")
    computed = count.increase(before, after, count.COMPUTED_TOKENS)
    outside = Outside(counted_tokens=None if computed is None else round(computed), peak_bytes=peak)
    return Run(side.label, side.label, figures(exchanges, outside), traces(exchanges))


class Typist:
    """Types for one user, and tells the server so; waits for no answer."""

    def __init__(self, up: Running, *, hints: bool) -> None:
        self._up = up
        self._hints = hints
        self._under_way: set[asyncio.Task[None]] = set()

    async def type(self, talk: Talk, question: str, typing_seconds: float) -> None:
        """Let the time of typing pass."""
        began = time.perf_counter()
        for at, draft in drafts(question, typing_seconds) if self._hints else ():
            await asyncio.sleep(began + at - time.perf_counter())
            hint = asyncio.create_task(_hint(self._up, {"messages": list(talk.messages), "draft": draft}))
            self._under_way.add(hint)
            hint.add_done_callback(self._under_way.discard)
        await asyncio.sleep(began + typing_seconds - time.perf_counter())


async def _hint(up: Running, body: Json) -> None:
    with suppress(OSError):  # it is only a hint
        await call(up.system.endpoint, "/v1/chat/prefetch", body)


async def _ask(up: Running, talk: Talk, question: str, options: BenchOptions) -> Exchange:
    request = Chat(talk.user, talk.ask(question), options.max_tokens, up.model)
    return await chat(up.system.endpoint, request, timeout_seconds=options.request_timeout)


def _mean_tokens(options: BenchOptions) -> int:
    """Of a conversation in the middle of a run, about."""
    return options.context + 2 * (4 * TEMPLATE_TOKENS + options.max_tokens)


def forget_files(folder: Path) -> None:
    """Have the operating system let go of what it keeps of these files in memory, where it can be asked to."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)  # what is not written yet cannot be let go of
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)
