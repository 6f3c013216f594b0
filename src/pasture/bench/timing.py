"""`pasture bench timing`: can one tenant feel, from the time to the first token, that another has sent a prompt before?

    for each probe     the victim sends either this very prompt or another of the same length, by the toss of a coin;
                       then the stranger sends the prompt, and measures
    own                the same within one tenant: what a hit feels like where there is one

The classifier is the best that one number allows, a threshold on the time; its quality is the area under the curve of hits
against false alarms, over all thresholds: 0.5 is a guess, 1 is certainty. With as many probes, chance alone moves a guesser's
area by the standard error that is printed. The stranger is also told how many tokens were found: those are how his own prompts
began, and never more where the victim was there before. One event loop, in the caller's thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from statistics import median

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from pasture.bench.answering import Answer, run_and_answer
from pasture.bench.client import Chat, Endpoint, Exchange, chat
from pasture.bench.corpus import passage
from pasture.bench.options import BenchOptions
from pasture.bench.report import seconds
from pasture.bench.run import progress_bar
from pasture.bench.systems import PASTURE, Running, Size, SystemFailed, running, variants

PROBES, OWN_PROBES = 400, 40
PROMPT_TOKENS = 96
TOLERANCE = 0.05
"""of the area around 0.5, on 400 probes"""
CONVINCING = 0.95
"""of the area within a tenant, or the measurement itself would be too dull to say anything"""
VICTIM, STRANGER = "victim", "stranger"
FLAGS = ("--api-key", f"{VICTIM},{STRANGER}", "--no-turn-ahead")


@dataclass(frozen=True, slots=True)
class Probe:
    """One prompt, and what its sender could see."""

    cached: bool
    """whether it had been sent before"""
    ttft_seconds: float
    cached_tokens: int


def main(options: BenchOptions) -> int:
    """Exit status: 0 when nothing can be told, 1 when something can, or nothing was measured."""
    return run_and_answer("timing", options, _measure)


async def _measure(options: BenchOptions, folder: Path, console: Console) -> Answer:
    flags = (*FLAGS, *options.serve_flags)
    system = variants(PASTURE, Size(1, 512, options.cells), replace(options, serve_flags=flags))[0]
    system = replace(system, endpoint=replace(system.endpoint, api_key=STRANGER))
    random = Random(options.seed)
    async with running(system, folder / "server.log") as up:
        with progress_bar(console) as progress:
            foreign = await _probes(up, random, VICTIM, PROBES * options.repeat, progress, options)
            own = await _probes(up, random, STRANGER, OWN_PROBES, progress, options)
    found = {
        "area": area(foreign),
        "standard_error": standard_error(foreign),
        "area_within_a_tenant": area(own),
        "probes": [asdict(probe) for probe in foreign],
    }
    held = abs(area(foreign) - 0.5) <= TOLERANCE and not tells(foreign) and area(own) >= CONVINCING
    return Answer(found, [table(foreign, own)], 0 if held else 1)


async def _probes(up: Running, random: Random, first: str, n: int, progress: Progress, options: BenchOptions) -> list[Probe]:
    """`n` prompts, half of them sent by the tenant `first` before the stranger sends them."""
    task = progress.add_task(f"cached by the {first}", total=n)
    coins = [True] * (n // 2) + [False] * (n - n // 2)
    random.shuffle(coins)
    found = []
    for cached in coins:
        prompt, other = (_never_sent(random) for _ in range(2))
        await _ask(up, replace(up.system.endpoint, api_key=first), prompt if cached else other, options)
        asked = await _ask(up, up.system.endpoint, prompt, options)
        found.append(Probe(cached, asked.ttft_seconds, asked.cached_tokens or 0))
        progress.advance(task)
    return found


def _never_sent(random: Random) -> str:
    """A text that begins like no other: passages alone come again, and would be the stranger's own."""
    return f"{random.getrandbits(64):016x} {passage(random, PROMPT_TOKENS)}"


async def _ask(up: Running, endpoint: Endpoint, prompt: str, options: BenchOptions) -> Exchange:
    request = Chat("", ({"role": "system", "content": prompt}, {"role": "user", "content": "Go on."}), 1, up.model)
    exchange = await chat(endpoint, request, timeout_seconds=options.request_timeout)
    if exchange.error is not None:
        raise SystemFailed(f"{up.system.label}: {exchange.error}")
    return exchange


def area(probes: Sequence[Probe]) -> float:
    """How often a cached probe was faster than one that was not, ties counted half: the area under the curve."""
    cached = [probe.ttft_seconds for probe in probes if probe.cached]
    cold = [probe.ttft_seconds for probe in probes if not probe.cached]
    won = sum((fast < slow) + (fast == slow) / 2 for fast in cached for slow in cold)
    return won / (len(cached) * len(cold))


def tells(probes: Sequence[Probe]) -> bool:
    """Whether the number of tokens found gives away what the time does not."""
    found = {cached: max((p.cached_tokens for p in probes if p.cached is cached), default=0) for cached in (True, False)}
    return found[True] > found[False]


def standard_error(probes: Sequence[Probe]) -> float:
    """Of the area of somebody who guesses."""
    n_cached = sum(probe.cached for probe in probes)
    n_cold = len(probes) - n_cached
    return math.sqrt((n_cached + n_cold + 1) / (12 * n_cached * n_cold))


def table(foreign: Sequence[Probe], own: Sequence[Probe]) -> Table:
    """Medians and areas, across tenants and within one."""
    made = Table(title=f"first token of a prompt that was sent before, and of one that was not; {len(foreign)} probes")
    for heading in ("sent before by", "before", "never", "tokens found", "area under the curve"):
        made.add_column(heading, justify="left" if heading == "sent before by" else "right")
    for name, probes in (("another tenant", foreign), ("the tenant itself", own)):
        before = [probe.ttft_seconds for probe in probes if probe.cached]
        never = [probe.ttft_seconds for probe in probes if not probe.cached]
        tokens = max(probe.cached_tokens for probe in probes)
        shown = f"{area(probes):.3f} ± {standard_error(probes):.3f}"
        made.add_row(name, seconds(median(before)), seconds(median(never)), f"{tokens:,}", shown)
    return made
