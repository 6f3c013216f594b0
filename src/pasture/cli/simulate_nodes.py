"""`pasture simulate TRACE --nodes N`: what the router would have done for recorded traffic, beside other rules.

Owns the table and the JSON of a `FleetComparison`; what is simulated is `pasture.cluster.simulated`'s business. Both say that
they are simulated, and under which assumptions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pasture.cli.output import err, out, print_json
from pasture.cluster.simulated import OURS, RULES, FleetComparison, FleetResult, compare
from pasture.core.errors import ConfigError
from pasture.foresight.nodes import LoadModel
from pasture.foresight.traces import TRACE_BLOCK_TOKENS, TraceRequest

PERCENTILES = (50.0, 99.0)


@dataclass(frozen=True, slots=True)
class Fleet:
    """What was asked for."""

    n_nodes: int
    capacities: tuple[int, ...]
    """of all nodes together; one at a time"""
    policy: str
    model: LoadModel
    in_flight: int | None
    """requests a node; None: at the trace's times"""


def simulate_nodes(trace: Path, requests: Sequence[TraceRequest], fleet: Fleet, *, references: bool, as_json: bool) -> None:
    """Replay with a progress bar and print; `references`: the other rules too. Raises ConfigError for several capacities."""
    if len(fleet.capacities) != 1:
        raise ConfigError("--nodes takes one --capacity: what all nodes hold together")
    rules = tuple(RULES) if references else (OURS,)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err(), transient=True) as progress:
        task = progress.add_task("Replaying", total=len(requests) * len(rules))
        found = compare(
            requests,
            fleet.n_nodes,
            fleet.capacities[0],
            fleet.policy,
            model=fleet.model,
            in_flight=fleet.in_flight,
            rules=rules,
            each=lambda rule: progress.update(task, advance=1, description=rule),
        )
    if as_json:
        print_json(_document(found, trace, fleet))
    else:
        out().print(_table(found, fleet))
        out().print(_assumptions(found, fleet), highlight=False)


def _table(found: FleetComparison, fleet: Fleet) -> Table:
    table = Table(
        title=f"Simulated: {fleet.n_nodes} nodes, {fleet.capacities[0]:,} tokens in all, {fleet.policy}", box=SIMPLE_HEAD
    )
    table.add_column("rule", no_wrap=True)
    for name in ("hit ratio", "of one pool", "own", "max / mean load", "GB moved", "TTFT s, mean", "p99", "req/s"):
        table.add_column(name, justify="right", min_width=5)
    for result in found.results:
        tally = result.tally
        table.add_row(
            result.rule,
            f"{tally.hit_ratio:.3f}",
            f"{tally.hit_ratio / found.pool_hit_ratio:.0%}" if found.pool_hit_ratio else "-",
            f"{tally.local_hit_ratio:.3f}",
            f"{tally.max_over_mean:.2f}",
            f"{tally.moved_bytes / 1e9:,.0f}",
            f"{tally.mean_first_token:.2f}",
            f"{tally.first_token(99):.1f}",
            f"{tally.requests_per_second:.2f}",
        )
    return table


def _assumptions(found: FleetComparison, fleet: Fleet) -> str:
    model = fleet.model
    arrivals = "at the trace's times" if fleet.in_flight is None else f"{fleet.in_flight} a node kept in flight"
    return (
        f"One pool of the same size and policy finds {found.pool_hit_ratio:.4f}. One more node takes "
        f"{found.taken_by_another_node:.1%} of the ring's keys (1/N: {1 / (fleet.n_nodes + 1):.1%}).\n"
        f"Assumed, not measured: a node prefills {model.prefill_tokens_per_second:,.0f} tokens/s; a stream takes "
        f"{model.token_seconds * 1000:g} ms a token and 1/{model.full_streams} of its node; a token's KV is "
        f"{model.kv_bytes_per_token / 1024:g} KiB and moves at {model.link_bytes_per_second / 1e9:g} GB/s after "
        f"{model.link_seconds * 1000:g} ms. Requests come {arrivals}."
    )


def _document(found: FleetComparison, trace: Path, fleet: Fleet) -> dict[str, object]:
    return {
        "simulated": True,
        "trace": trace.name,
        "block_tokens": TRACE_BLOCK_TOKENS,
        "nodes": fleet.n_nodes,
        "capacity_tokens": fleet.capacities[0],
        "policy": fleet.policy,
        "in_flight_per_node": fleet.in_flight,
        "load_model": asdict(fleet.model),
        "pool_hit_ratio": found.pool_hit_ratio,
        "taken_by_another_node": found.taken_by_another_node,
        "results": [_row(found, result) for result in found.results],
    }


def _row(found: FleetComparison, result: FleetResult) -> dict[str, object]:
    tally = result.tally
    return {
        "rule": result.rule,
        "requests": tally.requests,
        "prompt_tokens": tally.prompt_tokens,
        "hit_ratio": tally.hit_ratio,
        "share_of_pool": tally.hit_ratio / found.pool_hit_ratio if found.pool_hit_ratio else None,
        "own_tokens": tally.local_tokens,
        "pulled_tokens": tally.pulled_tokens,
        "moved_bytes": tally.moved_bytes,
        "max_over_mean_load": tally.max_over_mean,
        "max_over_mean_load_in_5_minutes": tally.window_max_over_mean,
        "node_seconds": tally.loads(),
        "utilisation": tally.utilisation,
        "first_token_seconds": {
            "mean": tally.mean_first_token,
            **{f"p{percentile:g}": tally.first_token(percentile) for percentile in PERCENTILES},
        },
        "requests_per_second": tally.requests_per_second,
        "decisions": {reason.value: n for reason, n in result.decisions.items()},
    }
