"""What happened between two looks at the statistics, in words: evictions, rests, returns, moves.

Counters that grew become one happening each. Nothing here keeps state; `between` is a function of two frozen pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pasture.core.statistics import ServiceStatistics
from pasture.core.storage import TierStatistics
from pasture.core.values import Form

_EVICTED = {
    "cells": "evicted: the pool was full",
    "sequences": "evicted: no sequence id was free",
    "idle": "left the live cache: idle, they rest in a tier",
    "layout": "left the live cache: the layout changed",
    "failure": "lost in a failed step, computed again when needed",
}


@dataclass(frozen=True, slots=True)
class Happening:
    """`amount` of `unit` (tokens, bytes, blocks, times); `kind` is one of a few words that a page gives a colour."""

    kind: str
    amount: int
    unit: str
    text: str


def between(before: ServiceStatistics, after: ServiceStatistics) -> list[Happening]:
    """What made the counters grow, in no particular order."""
    return [happening for happening in _candidates(before, after) if happening.amount > 0]


def _candidates(before: ServiceStatistics, after: ServiceStatistics) -> Iterator[Happening]:
    for reason, cells in after.pool.evicted_cells.items():
        kind = "demoted" if reason == "idle" else "evicted"
        text = _EVICTED.get(reason, f"evicted: {reason}")
        yield Happening(kind, cells - before.pool.evicted_cells.get(reason, 0), "tokens", text)
    stored = after.pool.hit_tokens.get("stored", 0) - before.pool.hit_tokens.get("stored", 0)
    yield Happening("restored", stored, "tokens", "came back from a tier instead of being computed")
    old, new = before.scheduler, after.scheduler
    yield Happening("swapped", new.swaps_total - old.swaps_total, "times", "a request waits in RAM: the pool is short")
    yield Happening("rejected", new.rejected_total - old.rejected_total, "times", "turned away: the line is full")
    yield Happening("moved", new.layout_moves_total - old.layout_moves_total, "times", f"the layout is now {_layout(after)}")
    yield Happening(
        "moved", new.shifts_total - old.shifts_total, "times", f"the live cache is now {after.pool.shape.form.value}"
    )
    yield Happening("moved", after.pool.compactions - before.pool.compactions, "times", "the live cache was compacted")
    known = {tier.name: tier for tier in before.store.tiers}
    for tier in after.store.tiers:
        if tier.name in known:
            yield from _of_tier(known[tier.name], tier)


def _of_tier(before: TierStatistics, after: TierStatistics) -> Iterator[Happening]:
    name = after.name
    yield Happening("demoted", after.written_bytes - before.written_bytes, "bytes", f"written to {name}")
    yield Happening("restored", after.read_bytes - before.read_bytes, "bytes", f"read from {name}")
    yield Happening(
        "evicted", after.evicted_blocks - before.evicted_blocks, "blocks", f"dropped by {name}: its budget is used up"
    )
    for form, size in after.bytes_by_form.items():
        if form is not Form.RAW:
            grown = size - before.bytes_by_form.get(form, 0)
            yield Happening("squeezed", grown, "bytes", f"more in {name} as {form.value}, to make room")
    yield Happening("damaged", after.damaged_blocks - before.damaged_blocks, "blocks", f"damaged in {name}, dropped")


def _layout(statistics: ServiceStatistics) -> str:
    return statistics.pool.shape.layout.value
