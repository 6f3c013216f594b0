"""`pasture bench soak`: sessions by the thousand, created, used and left. Does anything stay behind, does anything grow?

    before     a server over the fake engine, warm, after all that warmed it has expired
    load       --conversations sessions of two turns each, --users at once; every text is another. Memory is looked at meanwhile
    after      nobody asks for anything, until all has expired: cells, RAM, disk, rows, open files, resident memory

Time is compressed where that is honest: a session expires after seconds instead of days, and an engine that invents its tokens
answers at once, so that minutes see as many sessions begin and end as weeks would; what is looked at is the server's own
bookkeeping, and it is the product's: HTTP, scheduler, tiers, state. Budgets are small, so that they are full most of the time.
Ten requests a second for half an hour are 18,000: 9,000 sessions. What the foresight policy remembers of the past, at most
131,072 blocks, fills up over the first 20,000 of these sessions, and memory with it; behind a `--`, `--kv-policy lru` shows the
rest alone. One event loop, in the caller's thread.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from random import Random
from statistics import median

import psutil
from rich.console import Console
from rich.table import Table

from pasture.bench.answering import Answer, run_and_answer
from pasture.bench.client import Endpoint, call, call_json
from pasture.bench.options import BenchOptions
from pasture.bench.run import progress_bar
from pasture.bench.systems import PASTURE, Running, Size, SystemFailed, running, variants

IDLE_SECONDS = 4.0
"""after which a session expires, and its KV"""
TURNS = 2
WORDS = 60
"""of a session's own text, about five tokens of the fake engine each"""
WARM_SESSIONS = 64
SAMPLE_SECONDS = 0.5
PATIENCE_SECONDS = 120.0
"""for everything to expire"""
KEPT_FILES = 15
"""five connections to the state's database are kept for the next use, once they were needed at once: three files each"""
GROWTH = 0.05
"""of resident memory from the second quarter of the load to the last, beyond which something grows"""
FLAGS = (
    "--fake-engine", "--kv-ram", "8MiB", "--kv-disk", "24MiB", "--idle-live", "1s",
    "--session-idle", f"{IDLE_SECONDS:g}s", "--admin-key", "soak",
)  # fmt: skip


class _Gone(Exception):
    """The session has expired."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What a server holds at one moment."""

    cells: int
    ram_bytes: int
    disk_bytes: int
    sessions: int
    turns: int
    open_files: int
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class Soaked:
    """One run."""

    sessions: int
    cut_short: int
    """of these, sessions that expired between two turns"""
    requests: int
    load_seconds: float
    before: Standing
    most: Standing
    """the most of each while the load ran"""
    after: Standing
    expired_seconds: float
    """from the last reply until nothing was left"""
    growth: float
    """of resident memory from the second quarter of the load to the last, as a share"""

    @property
    def clean(self) -> bool:
        """Whether all is as it was before."""
        before, after = (replace(one, resident_bytes=0, open_files=0) for one in (self.before, self.after))
        return before == after and self.after.open_files - self.before.open_files <= KEPT_FILES and self.growth <= GROWTH


def main(options: BenchOptions) -> int:
    """Exit status: 0 when nothing stayed and nothing grew, 1 otherwise."""
    return run_and_answer("soak", options, _measure)


async def _measure(options: BenchOptions, folder: Path, console: Console) -> Answer:
    soaked = await soak(options, folder, console)
    return Answer({"soak": asdict(soaked), "clean": soaked.clean}, [table(soaked)], 0 if soaked.clean else 1)


async def soak(options: BenchOptions, folder: Path, console: Console) -> Soaked:
    """Raises SystemFailed when a request is not answered, or the server does not start."""
    flags = (*FLAGS, "--kv-cache", str(folder / "kv"), "--state", str(folder / "state.db"), *options.serve_flags)
    size = Size(options.users or 16, 2048, 8192)
    system = variants(PASTURE, size, replace(options, cells=8192, serve_flags=flags))[0]
    async with running(system, folder / "server.log") as up:
        endpoint = replace(system.endpoint, api_key="soak")
        await _use(up, Random(0), WARM_SESSIONS, size.users)
        before, _ = await _expired(up, endpoint)
        samples: list[tuple[float, Standing]] = []
        watching = asyncio.create_task(_watch(up, endpoint, samples))
        started = time.monotonic()
        with progress_bar(console) as progress:
            task = progress.add_task("sessions", total=options.conversations)
            done = n_gone = 0
            while done < options.conversations:
                n = min(100, options.conversations - done)
                n_gone += await _use(up, Random(f"{options.seed} {done}"), n, size.users)
                done += n
                progress.advance(task, n)
        ended = time.monotonic()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        after, seconds = await _expired(up, endpoint)
    return Soaked(
        sessions=done,
        cut_short=n_gone,
        requests=done * TURNS,
        load_seconds=ended - started,
        before=before,
        most=_most([standing for _, standing in samples] or [before]),
        after=after,
        expired_seconds=seconds,
        growth=growth([standing.resident_bytes for _, standing in samples]),
    )


def growth(resident: Sequence[int]) -> float:
    """From the second quarter to the last, medians, as a share; the first quarter is for filling budgets."""
    quarter = len(resident) // 4
    if not quarter:
        return 0.0
    early, late = median(resident[quarter : 2 * quarter]), median(resident[-quarter:])
    return (late - early) / early


async def _use(up: Running, random: Random, n_sessions: int, at_once: int) -> int:
    """Returns how many sessions expired between two turns: on a machine that is busy with other things, seconds pass."""
    texts = [" ".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=WORDS)) for _ in range(n_sessions)]

    async def worker() -> int:
        n_gone = 0
        while texts:
            n_gone += await _live(up, texts.pop())
        return n_gone

    return sum(await asyncio.gather(*(worker() for _ in range(at_once))))


async def _live(up: Running, text: str) -> int:
    """One session, from its beginning to where its client loses interest; 1 where it expired before."""
    made = await _post(up.system.endpoint, "/v1/sessions", {"messages": [{"role": "system", "content": text}]}, 201)
    for turn in range(TURNS):
        question = {"role": "user", "content": f"Question {turn}"}
        body = {"messages": [question], "session_id": made["id"], "max_tokens": 8, "ignore_eos": True}
        try:
            await _post(up.system.endpoint, "/v1/chat/completions", body, 200)
        except _Gone:
            return 1
    return 0


async def _post(endpoint: Endpoint, path: str, body: dict[str, object], status: int) -> dict[str, object]:
    found, data = await call(endpoint, path, body, timeout_seconds=60.0)
    if found == 404:
        raise _Gone
    if found != status:
        raise SystemFailed(f"{path} answered {found}: {data[:300].decode(errors='replace')}")
    answer: dict[str, object] = json.loads(data)
    return answer


async def _watch(up: Running, endpoint: Endpoint, samples: list[tuple[float, Standing]]) -> None:
    while True:
        samples.append((time.monotonic(), await _look(up, endpoint)))
        await asyncio.sleep(SAMPLE_SECONDS)


async def _expired(up: Running, endpoint: Endpoint) -> tuple[Standing, float]:
    """What is left when nothing more goes, and after how many seconds. Gives up waiting after PATIENCE_SECONDS."""
    started = time.monotonic()
    while True:
        standing = await _look(up, endpoint)
        waited = time.monotonic() - started
        empty = not (standing.cells or standing.ram_bytes or standing.disk_bytes or standing.sessions or standing.turns)
        if empty or waited > PATIENCE_SECONDS:
            return await _look(up, endpoint), waited
        await asyncio.sleep(SAMPLE_SECONDS)


async def _look(up: Running, endpoint: Endpoint) -> Standing:
    answer = await call_json(endpoint, "/v1/diagnosis", timeout_seconds=60.0)
    if answer is None or up.pid is None:
        raise SystemFailed("the server does not tell what it holds")
    facts = next(check["facts"] for check in answer["checks"] if check["name"] == "memory_growth")  # type: ignore[attr-defined]
    process = psutil.Process(up.pid)
    held = {name: tier["bytes"] for name, tier in facts["tiers"].items()}  # no tier is listed before its first picture
    return Standing(
        cells=facts["cells"]["used"],
        ram_bytes=held.get("ram", 0),
        disk_bytes=held.get("disk", 0),
        sessions=facts["state"]["sessions"],
        turns=facts["state"]["turns"],
        open_files=process.num_fds(),
        resident_bytes=process.memory_info().rss,
    )


def _most(standings: Sequence[Standing]) -> Standing:
    return Standing(*(max(values) for values in zip(*(astuple(one) for one in standings), strict=True)))


def table(soaked: Soaked) -> Table:
    """One row for each thing that could grow."""
    made = Table(
        title=f"{soaked.sessions:,} sessions, {soaked.requests:,} requests in {soaked.load_seconds:.0f} s; "
        f"{soaked.cut_short:,} expired between two turns, all {soaked.expired_seconds:.0f} s after the end"
    )
    for heading in ("", "before", "at most", "after"):
        made.add_column(heading, justify="right" if heading else "left")
    for name in asdict(soaked.before):
        values = [getattr(standing, name) for standing in (soaked.before, soaked.most, soaked.after)]
        shown = [f"{value / 2**20:,.1f} MiB" if name.endswith("bytes") else f"{value:,}" for value in values]
        made.add_row(name.replace("_", " ").removesuffix(" bytes"), *shown)
    made.add_section()
    made.add_row("resident, second quarter of the load to the last", "", "", f"{soaked.growth:+.1%}")
    return made
