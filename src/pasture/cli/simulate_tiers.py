"""`pasture simulate TRACE --disk TOKENS`: RAM and disk together, and what comes up before it is asked for.

Owns the table, the JSON and the plot of a `TierComparison`; what is simulated is `pasture.foresight.tier_runs`' business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pasture.cli.output import err, out, print_json
from pasture.core.errors import ConfigError
from pasture.foresight.tier_runs import TierComparison, TierResult, compare_tiers, tier_lines
from pasture.foresight.traces import TRACE_BLOCK_TOKENS, TraceRequest
from pasture.foresight.two_tiers import Ahead


@dataclass(frozen=True, slots=True)
class Tiers:
    """What was asked for."""

    ram_tokens: int
    disk_tokens: int
    policy: str
    cell_bytes: int
    """KV of a token"""
    typing_seconds: float
    """how long before a turn its front end hints at it"""


def simulate_tiers(trace: Path, requests: Sequence[TraceRequest], tiers: Tiers, *, as_json: bool, plot: Path | None) -> None:
    """Replay with a progress bar and print. Raises ConfigError for a disk that is no larger than RAM."""
    if tiers.disk_tokens <= tiers.ram_tokens:
        raise ConfigError("--disk: the disk holds what RAM holds too, so it has to be larger than --capacity")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err(), transient=True) as progress:
        task = progress.add_task("Replaying", total=len(requests) * len(tier_lines(tiers.policy)))

        def advance(policy: str, ahead: Ahead) -> None:
            progress.update(task, advance=1, description=f"{policy}, ahead: {ahead}")

        found = compare_tiers(requests, tiers.ram_tokens, tiers.disk_tokens, tiers.policy, advance, tiers.typing_seconds)
    if plot is not None:
        write_tier_plot(found, trace.name, plot)
    if as_json:
        print_json(_document(found, trace, tiers))
    else:
        out().print(_table(found, tiers))
        out().print(
            f"Of the blocks that conversations return to, at most {found.foreseeable:.1%} could be in this RAM before, "
            "for whoever knows how likely each return is, and not when.",
            highlight=False,
        )
        out().print(
            f"hints: as if every user's front end said that they type, {tiers.typing_seconds:g} s before each turn. "
            "The trace does not tell that; these hints are made of its next turns.",
            highlight=False,
        )


def _table(found: TierComparison, tiers: Tiers) -> Table:
    title = f"RAM {found.ram_tokens:,} tokens, disk {found.disk_tokens:,}; hit ratio without bounds {found.unbounded:.3f}"
    table = Table(title=title)
    for name in ("policy", "ahead"):
        table.add_column(name)
    for name in ("RAM", "disk", "both", "read", "written", "ahead blocks", "precision", "recall", "blocks/s"):
        table.add_column(name, justify="right")
    for result in found.results:
        tally, precision = result.tally, result.tally.precision
        table.add_row(
            result.policy,
            result.ahead,
            f"{result.ram_hit_ratio:.4f}",
            f"{result.disk_hit_ratio:.4f}",
            f"{result.ram_hit_ratio + result.disk_hit_ratio:.4f}",
            _gigabytes(result.read_tokens, tiers),
            _gigabytes(result.written_tokens, tiers),
            f"{tally.issued_blocks:,}",
            "-" if precision is None else f"{precision:.1%}",
            "-" if precision is None else f"{found.recall(result):.1%}",
            f"{result.operations_per_second:,.0f}",
        )
    return table


def _gigabytes(n_tokens: int, tiers: Tiers) -> str:
    return f"{n_tokens * tiers.cell_bytes / 1e9:,.0f} GB"


def _document(found: TierComparison, trace: Path, tiers: Tiers) -> dict[str, object]:
    return {
        "trace": trace.name,
        "block_tokens": TRACE_BLOCK_TOKENS,
        "ram_tokens": found.ram_tokens,
        "disk_tokens": found.disk_tokens,
        "cell_bytes": tiers.cell_bytes,
        "typing_seconds": tiers.typing_seconds,
        "unbounded_hit_ratio": found.unbounded,
        "foreseeable_share_of_returns": found.foreseeable,
        "results": [_row(found, result, tiers) for result in found.results],
    }


def _row(found: TierComparison, result: TierResult, tiers: Tiers) -> dict[str, object]:
    tally = result.tally
    return {
        "policy": result.policy,
        "ahead": result.ahead.value,
        "ram_hit_ratio": result.ram_hit_ratio,
        "disk_hit_ratio": result.disk_hit_ratio,
        "requests": tally.requests,
        "prompt_tokens": tally.prompt_tokens,
        "lifted_blocks": tally.lifted_blocks,
        "ahead_blocks": tally.issued_blocks,
        "ahead_used_blocks": tally.used_blocks,
        "precision": tally.precision,
        "recall": found.recall(result),
        "read_bytes": result.read_tokens * tiers.cell_bytes,
        "written_bytes": result.written_tokens * tiers.cell_bytes,
        "block_operations": tally.blocks,
        "block_operations_per_second": result.operations_per_second,
    }


def write_tier_plot(found: TierComparison, title: str, file: Path) -> None:
    """Hits by tier, a bar a line of the table. Raises ConfigError without plotly, or where nothing can be written."""
    try:
        import plotly.graph_objects as go  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError("--plot needs plotly: pip install 'pasture[bench]'") from error
    names = [f"{result.policy}, ahead: {result.ahead}" for result in found.results]
    figure = go.Figure()
    figure.add_bar(x=names, y=[result.ram_hit_ratio for result in found.results], name="RAM")
    figure.add_bar(x=names, y=[result.disk_hit_ratio for result in found.results], name="disk")
    figure.add_hline(y=found.unbounded, line_dash="dot", annotation_text="without bounds")
    figure.update_layout(title=title, barmode="stack", yaxis_title="hit ratio", template="simple_white")
    try:
        figure.write_html(file, include_mathjax=False)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}") from error
