"""What a benchmark found out: runs, the better variant of each peer, users inside the service level, memory at equal users.

Frozen values, and their JSON form. Prompts and replies are not kept, only when things happened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from pasture.bench.client import Exchange
from pasture.bench.measure import Figures, medians


@dataclass(frozen=True, slots=True)
class Trace:
    """One request of a run; seconds from the start of the run, None where no text came."""

    user: str
    sent: float
    first: float | None
    ended: float
    gaps: tuple[float, ...]
    prompt_tokens: int | None
    cached_tokens: int | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Run:
    """One system through one workload once."""

    peer: str
    label: str
    figures: Figures
    traces: tuple[Trace, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """One variant of a peer, over all its runs."""

    peer: str
    label: str
    runs: int
    median: Figures


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that is written down."""

    title: str
    settings: dict[str, str]
    machine: dict[str, str]
    summaries: tuple[Summary, ...]
    """every variant measured"""
    best: tuple[Summary, ...]
    """pasture, then the better variant of each peer"""
    users_within_slo: dict[str, int]
    """by peer; empty where no service level was given"""
    memory: dict[str, Figures]
    """by peer: a run with just the cells that the workload needs; empty where it was not asked for"""
    runs: tuple[Run, ...]

    def write_json(self, path: Path) -> None:
        path.write_bytes(orjson.dumps(self, option=orjson.OPT_INDENT_2))


def traces(exchanges: Sequence[Exchange]) -> tuple[Trace, ...]:
    """In order of sending."""
    ordered = sorted(exchanges, key=lambda exchange: exchange.sent)
    start = ordered[0].sent if ordered else 0.0
    return tuple(
        Trace(
            user=exchange.chat.user,
            sent=exchange.sent - start,
            first=exchange.text_times[0] - start if exchange.text_times else None,
            ended=exchange.ended - start,
            gaps=tuple(round(gap, 6) for gap in exchange.gaps_seconds),
            prompt_tokens=exchange.prompt_tokens,
            cached_tokens=exchange.cached_tokens,
            error=exchange.error,
        )
        for exchange in ordered
    )


def summarise(runs: Sequence[Run]) -> tuple[Summary, ...]:
    """One summary a label, in order of first appearance."""
    labels = dict.fromkeys((run.peer, run.label) for run in runs)
    return tuple(
        Summary(peer, label, len(chosen), medians([run.figures for run in chosen]))
        for peer, label in labels
        if (chosen := [run for run in runs if run.label == label])
    )


def best_variants(summaries: Sequence[Summary]) -> tuple[Summary, ...]:
    """Of each peer the variant with the fewest errors, then the shortest median wall."""
    peers = dict.fromkeys(summary.peer for summary in summaries)
    return tuple(
        min((summary for summary in summaries if summary.peer == peer), key=lambda s: (s.median.errors, s.median.wall_seconds))
        for peer in peers
    )
