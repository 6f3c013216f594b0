"""A benchmark's report in the terminal: one row a figure, one column a system, and pasture's ratio to each peer.

Owns which figures are shown and how they are written; measures nothing. A ratio below 1 means that pasture needs less; for
tokens/s and users a ratio above 1 means that it does more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pasture.bench.measure import Figures
from pasture.bench.results import Report, Run, Summary

Number = int | float | None


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of the table."""

    name: str
    value: Callable[[Figures], Number]
    text: Callable[[float], str]


def seconds(value: float) -> str:
    """`0.83 s`, `12.1 s`, or `83 ms` below a tenth of a second."""
    if value < 0.1:
        return f"{value * 1000:.0f} ms"
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


def mebibytes(value: float) -> str:
    return f"{value / 2**20:,.0f} MiB"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


ROWS = (
    Row("wall", lambda f: f.wall_seconds, seconds),
    Row("TTFT mean", lambda f: f.ttft_mean_seconds, seconds),
    Row("TTFT p50", lambda f: f.ttft_p50_seconds, seconds),
    Row("TTFT p95", lambda f: f.ttft_p95_seconds, seconds),
    Row("end-to-end mean", lambda f: f.latency_mean_seconds, seconds),
    Row("end-to-end p95", lambda f: f.latency_p95_seconds, seconds),
    Row("inter-token p50", lambda f: f.itl_p50_seconds, seconds),
    Row("inter-token p95", lambda f: f.itl_p95_seconds, seconds),
    Row("longest gap in a stream", lambda f: f.itl_max_seconds, seconds),
    Row("tokens/s", lambda f: f.tokens_per_second, lambda value: f"{value:.1f}"),
    Row("prompt tokens", lambda f: f.prompt_tokens, _whole),
    Row("prompt tokens computed", lambda f: f.computed_tokens, _whole),
    Row("  by the server's counters", lambda f: f.counted_tokens, _whole),
    Row("distinct prompt tokens", lambda f: f.distinct_tokens, _whole),
    Row("computed / distinct", lambda f: f.computed_ratio, lambda value: f"{value:.3f}"),
    Row("peak memory", lambda f: f.peak_bytes, mebibytes),
    Row("errors", lambda f: f.errors, _whole),
)


def print_report(report: Report, console: Console) -> None:
    """The figures of the better variants, then what else was asked for."""
    console.print(_figures_table(report))
    left_out = [summary for summary in report.summaries if summary not in report.best]
    for summary in left_out:
        console.print(f"not shown, {_why_left_out(summary)}", highlight=False)
    for run in report.runs:
        print_errors(run, console)
    if report.users_within_slo:
        console.print(_users_table(report))
    if report.memory:
        console.print(_memory_table(report))


def _why_left_out(summary: Summary) -> str:
    """Errors count before time: who refuses half of the requests is soon done."""
    if summary.median.errors:
        return f"failed {_whole(summary.median.errors)} of its requests: {summary.label}"
    return f"slower: {summary.label}, wall {seconds(summary.median.wall_seconds)}"


def print_errors(run: Run, console: Console) -> None:
    """Each different error of a run once."""
    for error in dict.fromkeys(trace.error for trace in run.traces if trace.error is not None):
        console.print(Text.assemble((f"{run.label}: ", "red"), error))


def _figures_table(report: Report) -> Table:
    ours, *peers = report.best
    repeats = f", medians of {ours.runs} runs" if ours.runs > 1 else ""
    table = Table(title=report.title + repeats)
    table.add_column("", no_wrap=True)
    table.add_column(ours.label, justify="right")
    for peer in peers:
        table.add_column(peer.label, justify="right")
        table.add_column("ratio", justify="right", style="bold")
    for row in ROWS:
        value = row.value(ours.median)
        cells = [row.name, _text(row, value)]
        for peer in peers:
            theirs = row.value(peer.median)
            cells += [_text(row, theirs), ratio_text(value, theirs)]
        table.add_row(*cells)
    return table


def _users_table(report: Report) -> Table:
    table = Table(title=f"users inside {report.settings['slo']}")
    table.add_column("")
    table.add_column("users", justify="right")
    table.add_column("pasture's ratio", justify="right", style="bold")
    ours = report.users_within_slo[report.best[0].peer]
    for peer, users in report.users_within_slo.items():
        table.add_row(peer, str(users), "" if peer == report.best[0].peer else ratio_text(ours, users))
    return table


def _memory_table(report: Report) -> Table:
    table = Table(title="peak memory, each system with just the cells that the workload needs")
    table.add_column("")
    table.add_column("memory", justify="right")
    table.add_column("pasture's ratio", justify="right", style="bold")
    ours = report.memory[report.best[0].peer].peak_bytes
    for peer, run in report.memory.items():
        text = "-" if run.peak_bytes is None else mebibytes(run.peak_bytes)
        table.add_row(peer, text, "" if peer == report.best[0].peer else ratio_text(ours, run.peak_bytes))
    return table


def _text(row: Row, value: Number) -> str:
    return "-" if value is None else row.text(float(value))


def ratio_text(ours: Number, theirs: Number) -> str:
    """`0.31x`, or nothing where there is nothing to divide."""
    return f"{ours / theirs:.2f}x" if ours is not None and theirs else ""
