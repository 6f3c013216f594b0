"""`pasture simulate TRACE`: what an eviction policy would have done for recorded traffic, without a model or a server.

Owns the table, the JSON and the plot of a `Comparison`; what is simulated is `pasture.foresight.simulator`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pasture.cli.output import err, out, print_json
from pasture.cli.simulate_nodes import Fleet, simulate_nodes
from pasture.cli.simulate_tiers import Tiers, simulate_tiers
from pasture.core.errors import ConfigError
from pasture.foresight.hints import TYPING_SECONDS
from pasture.foresight.nodes import PREFILL_TOKENS_PER_SECOND, LoadModel
from pasture.foresight.simulator import Comparison, Result, lines, simulate
from pasture.foresight.traces import SESSION_SECONDS, TRACE_BLOCK_TOKENS, TraceRequest, read_trace

CELL_BYTES = 23_040
"""KV of a token of SmolLM2 135M in f16"""
_SUFFIXES = {"k": 1_000, "m": 1_000_000, "g": 1_000_000_000}


class PolicyName(StrEnum):
    """What `--policy` knows."""

    LRU = "lru"
    S3FIFO = "s3fifo"
    FORESIGHT = "foresight"


Nodes = Annotated[
    int | None, typer.Option("--nodes", min=1, metavar="N", help="Nodes that share the capacity: the router, beside others.")
]
InFlight = Annotated[
    int | None, typer.Option("--in-flight", min=1, metavar="N", help="Requests kept running a node, for --nodes.")
]
PrefillRate = Annotated[
    float, typer.Option("--prefill-rate", min=1.0, metavar="TOKENS/S", help="What a node computes, for --nodes.")
]


def simulate_command(
    trace: Annotated[
        Path,
        typer.Argument(metavar="TRACE", help="Mooncake format or coding sessions; .jsonl or .jsonl.gz.", show_default=False),
    ],
    policy: Annotated[PolicyName, typer.Option("--policy", help="The eviction policy to try.")] = PolicyName.FORESIGHT,
    capacity: Annotated[
        str, typer.Option("--capacity", metavar="TOKENS,..", help="Tokens the cache holds (250k, 4M); several with commas.")
    ] = "1M",
    references: Annotated[
        bool,
        typer.Option(
            "--references/--no-references",
            help="Also LRU, S3-FIFO and Belady, who knows the future; with --nodes the other rules.",
        ),
    ] = True,
    session_every: Annotated[
        float, typer.Option("--session-every", metavar="SECONDS", help="Between the starts of two coding sessions.")
    ] = SESSION_SECONDS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    disk: Annotated[
        str | None, typer.Option("--disk", metavar="TOKENS", help="Tokens a disk behind it holds: two tiers, and prefetching.")
    ] = None,
    cell_bytes: Annotated[
        int, typer.Option("--cell-bytes", min=1, metavar="BYTES", help="KV of a token, for the bytes that --disk tells of.")
    ] = CELL_BYTES,
    typing: Annotated[
        float,
        typer.Option("--typing", min=0.0, metavar="SECONDS", help="Before a turn, that front ends hint at it; for --disk."),
    ] = TYPING_SECONDS,
    nodes: Nodes = None,
    in_flight: InFlight = None,
    prefill_rate: PrefillRate = PREFILL_TOKENS_PER_SECOND,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Write a plot (HTML) here; needs plotly.")] = None,
) -> None:
    """Replay recorded traffic against a cache policy and print how much of it would have been found.

    pasture simulate conversations.jsonl.gz --policy foresight --capacity 250k,1M,4M
    """
    capacities = [parse_tokens(part) for part in capacity.split(",")]
    if nodes is None and in_flight is not None:
        raise ConfigError("--in-flight is for --nodes")
    if nodes is not None and (disk is not None or plot is not None):
        raise ConfigError("--nodes goes with neither --disk nor --plot")
    requests = read_trace(trace, session_seconds=session_every)
    if nodes is not None:
        fleet = Fleet(nodes, tuple(capacities), policy.value, LoadModel(prefill_rate), in_flight)
        simulate_nodes(trace, requests, fleet, references=references, as_json=as_json)
    elif disk is not None:
        if len(capacities) != 1:
            raise ConfigError("--disk takes one --capacity: what RAM holds")
        tiers = Tiers(capacities[0], parse_tokens(disk), policy.value, cell_bytes, typing)
        simulate_tiers(trace, requests, tiers, as_json=as_json, plot=plot)
    else:
        comparison = _replayed(requests, lines(policy.value, references=references), capacities)
        if plot is not None:
            write_plot(comparison, trace.name, plot)
        if as_json:
            print_json(_document(comparison, trace))
        else:
            out().print(_table(comparison))


def _replayed(requests: Sequence[TraceRequest], compared: Sequence[str], capacities: Sequence[int]) -> Comparison:
    """Behind a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err(), transient=True) as progress:
        task = progress.add_task("Replaying", total=len(requests) * len(compared) * len(capacities))

        def advance(name: str, tokens: int) -> None:
            progress.update(task, advance=1, description=f"{name}, {short(tokens)} tokens")

        return simulate(requests, compared, capacities, advance)


def parse_tokens(text: str) -> int:
    """`250k`, `4M` or a plain number of tokens. Raises ConfigError for anything else, and for less than a block."""
    text = text.strip()
    factor = _SUFFIXES.get(text[-1:].lower(), 1)
    try:
        tokens = int(float(text[:-1] if factor > 1 else text) * factor)
    except (ValueError, OverflowError):
        raise ConfigError(f"--capacity: {text!r} is no number of tokens (250k, 4M)") from None
    if tokens < TRACE_BLOCK_TOKENS:
        raise ConfigError(f"--capacity: {text!r} is less than one block of {TRACE_BLOCK_TOKENS} tokens")
    return tokens


def short(tokens: int) -> str:
    """`250k`, `4M`."""
    for suffix, factor in (("M", 1_000_000), ("k", 1_000)):
        if tokens >= factor:
            return f"{tokens / factor:g}{suffix}"
    return str(tokens)


def _table(comparison: Comparison) -> Table:
    table = Table(title=f"Hit ratio by tokens; without bounds {comparison.unbounded:.3f}")
    for name in ("capacity", "policy", "hit ratio", "LRU to Belady", "stored", "evicted", "blocks/s"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for result in comparison.results:
        way = comparison.way_to_belady(result)
        table.add_row(
            short(result.capacity_tokens),
            result.policy,
            f"{result.hit_ratio:.4f}",
            "-" if way is None else f"{way:.0%}",
            f"{result.stored_blocks:,}",
            f"{result.evicted_blocks:,}",
            f"{result.operations_per_second:,.0f}",
        )
    return table


def _document(comparison: Comparison, trace: Path) -> dict[str, object]:
    return {
        "trace": trace.name,
        "block_tokens": TRACE_BLOCK_TOKENS,
        "unbounded_hit_ratio": comparison.unbounded,
        "results": [_row(comparison, result) for result in comparison.results],
    }


def _row(comparison: Comparison, result: Result) -> dict[str, object]:
    return {
        "policy": result.policy,
        "capacity_tokens": result.capacity_tokens,
        "hit_ratio": result.hit_ratio,
        "way_from_lru_to_belady": comparison.way_to_belady(result),
        "requests": result.requests,
        "prompt_tokens": result.prompt_tokens,
        "hit_tokens": result.hit_tokens,
        "stored_blocks": result.stored_blocks,
        "evicted_blocks": result.evicted_blocks,
        "block_operations": result.block_operations,
        "block_operations_per_second": result.operations_per_second,
    }


def write_plot(comparison: Comparison, title: str, file: Path) -> None:
    """Hit ratio over capacity, a line a policy. Raises ConfigError without plotly, or where nothing can be written."""
    try:
        import plotly.graph_objects as go  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError("--plot needs plotly: pip install 'pasture[bench]'") from error
    figure = go.Figure()
    for policy in dict.fromkeys(result.policy for result in comparison.results):
        mine = sorted((r for r in comparison.results if r.policy == policy), key=lambda r: r.capacity_tokens)
        figure.add_scatter(x=[r.capacity_tokens for r in mine], y=[r.hit_ratio for r in mine], name=policy)
    figure.add_hline(y=comparison.unbounded, line_dash="dot", annotation_text="without bounds")
    figure.update_layout(title=title, xaxis_type="log", xaxis_title="tokens", yaxis_title="hit ratio", template="simple_white")
    try:
        figure.write_html(file, include_mathjax=False)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}") from error
