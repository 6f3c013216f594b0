"""Figures of one run, and medians over runs.

Owns the definitions: TTFT is from sending the request to its first text; the inter-token gap is between chunks that carry
text; `wall` is from the first request sent to the last reply ended; tokens/s counts generated tokens over the wall. Pure; any
thread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from pasture.bench.client import Exchange


@dataclass(frozen=True, slots=True)
class Figures:
    """One run in numbers; None where a run has no such number (no reply came, or the server does not tell)."""

    requests: int
    errors: int
    wall_seconds: float
    ttft_mean_seconds: float | None
    ttft_p50_seconds: float | None
    ttft_p95_seconds: float | None
    latency_mean_seconds: float | None
    latency_p95_seconds: float | None
    itl_p50_seconds: float | None
    itl_p95_seconds: float | None
    itl_max_seconds: float | None
    tokens_per_second: float
    generated_tokens: int
    prompt_tokens: int | None
    computed_tokens: int | None
    """prompt tokens that the server computed: sum of prompt_tokens - cached_tokens of its `usage`"""
    distinct_tokens: int | None
    """prompt tokens that a perfect cache would have computed; see `distinct`"""
    counted_tokens: int | None
    """computed prompt tokens by the server's own counters (pasture), to check `computed_tokens` with"""
    workload_cells: int | None
    """cells that hold every prompt and reply of the run once"""
    longest_tokens: int | None
    """the longest conversation, its reply included"""
    peak_cells: int | None
    """the most cells in use at once, where the server tells (pasture)"""
    peak_bytes: int | None

    @property
    def computed_ratio(self) -> float | None:
        """Computed over distinct prompt tokens; 1 is perfect."""
        if self.computed_tokens is None or not self.distinct_tokens:
            return None
        return self.computed_tokens / self.distinct_tokens

    def level(self, name: str) -> float | None:
        """A figure by its service-level name, `ttft_p95`."""
        value = getattr(self, f"{name}_seconds")
        return None if value is None else float(value)


@dataclass(frozen=True, slots=True)
class Outside:
    """What only somebody beside the client can know of a run; None where nobody does."""

    distinct_tokens: int | None = None
    workload_cells: int | None = None
    counted_tokens: int | None = None
    peak_cells: int | None = None
    peak_bytes: int | None = None


def figures(exchanges: Sequence[Exchange], outside: Outside = Outside()) -> Figures:
    """Figures of one run."""
    good = [exchange for exchange in exchanges if exchange.error is None]
    ttft = [exchange.ttft_seconds for exchange in good]
    latency = [exchange.latency_seconds for exchange in good]
    gaps = [gap for exchange in good for gap in exchange.gaps_seconds]
    wall = max((e.ended for e in exchanges), default=0.0) - min((e.sent for e in exchanges), default=0.0)
    generated = sum(exchange.completion_tokens or len(exchange.text_times) for exchange in good)
    return Figures(
        requests=len(exchanges),
        errors=len(exchanges) - len(good),
        wall_seconds=wall,
        ttft_mean_seconds=fmean(ttft) if ttft else None,
        ttft_p50_seconds=quantile(ttft, 0.5),
        ttft_p95_seconds=quantile(ttft, 0.95),
        latency_mean_seconds=fmean(latency) if latency else None,
        latency_p95_seconds=quantile(latency, 0.95),
        itl_p50_seconds=quantile(gaps, 0.5),
        itl_p95_seconds=quantile(gaps, 0.95),
        itl_max_seconds=max(gaps, default=None),
        tokens_per_second=generated / wall if wall else 0.0,
        generated_tokens=generated,
        prompt_tokens=_sum([exchange.prompt_tokens for exchange in good]),
        computed_tokens=_sum([_computed(exchange) for exchange in good]),
        distinct_tokens=outside.distinct_tokens,
        counted_tokens=outside.counted_tokens,
        workload_cells=outside.workload_cells,
        longest_tokens=max((_length(exchange) for exchange in good), default=None),
        peak_cells=outside.peak_cells,
        peak_bytes=outside.peak_bytes,
    )


def quantile(values: Sequence[float], share: float) -> float | None:
    """Linear between the neighbouring ranks; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def medians(runs: Sequence[Figures]) -> Figures:
    """Field by field; None where any run lacks the figure. Errors and requests are summed. Raises ValueError of no run."""
    if not runs:
        raise ValueError("no run to take a median of")
    values: dict[str, int | float | None] = {}
    for entry in dataclasses.fields(Figures):
        column = [getattr(run, entry.name) for run in runs]
        if entry.name in ("requests", "errors"):
            values[entry.name] = sum(column)
        elif None in column:
            values[entry.name] = None
        else:
            middle = median(column)
            values[entry.name] = round(middle) if isinstance(column[0], int) else middle
    return Figures(**values)  # type: ignore[arg-type] # each field keeps the type of its column


def _computed(exchange: Exchange) -> int | None:
    if exchange.prompt_tokens is None or exchange.cached_tokens is None:
        return None
    return exchange.prompt_tokens - exchange.cached_tokens


def _length(exchange: Exchange) -> int:
    return (exchange.prompt_tokens or 0) + (exchange.completion_tokens or len(exchange.text_times))


def _sum(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None
