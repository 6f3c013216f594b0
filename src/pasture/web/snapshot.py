"""The service's statistics as the JSON that the pages draw: small, bounded, without anything that people wrote.

Sequences and prefixes go as rows of numbers, because there may be hundreds of them twice a second; `SEQUENCE_FIELDS`,
`PREFIX_FIELDS` and `NAMESPACE_FIELDS` name the columns. Namespaces are numbered in the order of their arrival, not named.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pasture.core.statistics import (
    NamespaceStatistics,
    PoolStatistics,
    PrefixStatistics,
    SchedulerStatistics,
    SequenceStatistics,
    ServiceStatistics,
)
from pasture.core.storage import StoreStatistics, TierStatistics
from pasture.core.values import Namespace
from pasture.web.latency import Percentiles

Json = dict[str, object]

MAX_SEQUENCES = 256
MAX_NAMESPACES = 50
NAMESPACE_FIELDS = ("number", "cells", "shared_cells", "sequences", "hit_tokens", "missed_tokens")
SEQUENCE_FIELDS = ("sequence", "state", "tokens", "shared_tokens", "idle_seconds", "prefix")
PREFIX_FIELDS = ("number", "parent", "namespace", "start", "tokens", "holders", "running", "idle_seconds", "hits", "replica")


@dataclass(frozen=True, slots=True)
class Latencies:
    """What clients felt in the last minute; None where nobody did."""

    first_token: Percentiles | None
    inter_token: Percentiles | None


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens a second, in the last few seconds."""

    generated: float
    computed: float
    reused: float


def draw(statistics: ServiceStatistics, latencies: Latencies, rates: Rates) -> Json:
    """All but the pool's `rows`. The caller adds them, and what happened."""
    return {
        "uptime_seconds": round(statistics.uptime_seconds, 1),
        "draining": statistics.draining,
        "headline": _headline(statistics),
        "requests": _requests(statistics.scheduler),
        "rates": {name: round(rate, 1) for name, rate in asdict(rates).items()},
        "latency": {
            "first_token": None if latencies.first_token is None else asdict(latencies.first_token),
            "inter_token": None if latencies.inter_token is None else asdict(latencies.inter_token),
        },
        "pool": _pool(statistics),
        "tiers": [_tier(tier) for tier in statistics.store.tiers],
        "gate": _gate(statistics.store),
    }


def rows(pool: PoolStatistics) -> Json:
    """Namespaces, sequences and prefixes, the largest of many."""
    numbers: dict[Namespace, int] = {}
    for namespace in (*(row.namespace for row in pool.namespaces), *(prefix.namespace for prefix in pool.prefixes)):
        numbers.setdefault(namespace, len(numbers) + 1)
    busiest = sorted(pool.namespaces, key=lambda row: -(row.hit_tokens + row.missed_tokens))[:MAX_NAMESPACES]
    largest = pool.sequences
    if len(largest) > MAX_SEQUENCES:
        largest = tuple(sorted(largest, key=lambda sequence: -sequence.n_tokens)[:MAX_SEQUENCES])
    return {
        "namespaces": [_namespace(row, numbers[row.namespace]) for row in busiest],
        "sequences": [_sequence(sequence) for sequence in largest],
        "prefixes": [_prefix(prefix, numbers[prefix.namespace]) for prefix in pool.prefixes],
    }


def _headline(statistics: ServiceStatistics) -> Json:
    """`saved_seconds`: what computing the reused tokens would take at the measured rate; None before one is measured."""
    scheduler = statistics.scheduler
    rate = scheduler.prefill_tokens_per_second
    return {
        "prompt_tokens": scheduler.prompt_tokens_total,
        "computed_tokens": scheduler.computed_tokens_total,
        "reused_tokens": scheduler.cached_tokens_total,
        "generated_tokens": scheduler.generated_tokens_total,
        "ahead_tokens": scheduler.ahead_tokens_total,
        "restored_tokens": statistics.pool.hit_tokens.get("stored", 0),
        "saved_seconds": round(scheduler.cached_tokens_total / rate, 1) if rate > 0 else None,
        "prefill_tokens_per_second": round(rate, 1),
    }


def _requests(scheduler: SchedulerStatistics) -> Json:
    return {
        "users": scheduler.users,
        "waiting": scheduler.waiting,
        "prefilling": scheduler.prefilling,
        "decoding": scheduler.decoding,
        "swapped": scheduler.swapped,
        "submitted": scheduler.submitted_total,
        "finished": sum(scheduler.finished_total.values()),
        "rejected": scheduler.rejected_total,
    }


def _pool(statistics: ServiceStatistics) -> Json:
    pool = statistics.pool
    return {
        "cells": pool.shape.n_cells,
        "used_cells": pool.used_cells,
        "running_cells": pool.running_cells,
        "idle_cells": pool.idle_cells,
        "shared_cells": pool.shared_cells,
        "saved_cells": pool.saved_cells,
        "peak_cells": pool.peak_cells,
        "cell_bytes": statistics.live_bytes / max(1, pool.shape.n_cells),  # an ingress without a replica has no cells
        "bytes": statistics.live_bytes,
        "layout": pool.shape.layout.value,
        "form": pool.shape.form.value,
        "sequences": len(pool.sequences),
        "namespaces": len(pool.namespaces),
    }


def _tier(tier: TierStatistics) -> Json:
    return {
        "name": tier.name,
        "blocks": tier.blocks,
        "bytes": tier.bytes,
        "budget_bytes": tier.budget_bytes,
        "pinned_bytes": tier.pinned_bytes,
        "in_flight_bytes": tier.in_flight_bytes,
        "bytes_by_form": {form.value: size for form, size in tier.bytes_by_form.items() if size},
        "hit_tokens": tier.hit_tokens,
        "missed_tokens": tier.missed_tokens,
        "written_bytes": tier.written_bytes,
        "read_bytes": tier.read_bytes,
        "evicted_blocks": tier.evicted_blocks,
        "errors": tier.errors + tier.damaged_blocks,
        "latency_seconds": tier.latency_seconds,
        "bytes_per_second": tier.bytes_per_second,
        "remote": None if tier.remote is None else asdict(tier.remote),
    }


def _gate(store: StoreStatistics) -> Json:
    return {"restore_bytes_per_second": store.restore_bytes_per_second, "refusals": dict(store.gate_refusals)}


def _namespace(row: NamespaceStatistics, number: int) -> list[int]:
    return [number, row.cells, row.shared_cells, row.sequences, row.hit_tokens, row.missed_tokens]


def _sequence(sequence: SequenceStatistics) -> list[object]:
    idle = round(sequence.idle_seconds, 1)
    return [sequence.sequence, sequence.state.value, sequence.n_tokens, sequence.shared_tokens, idle, sequence.prefix]


def _prefix(prefix: PrefixStatistics, namespace: int) -> list[object]:
    idle = round(prefix.idle_seconds, 1)
    return [
        prefix.number, prefix.parent, namespace, prefix.start, prefix.n_tokens, prefix.holders, prefix.running, idle,
        prefix.hits, prefix.replica,
    ]  # fmt: skip
