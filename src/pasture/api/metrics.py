"""`/metrics`: the service's statistics in Prometheus' words, and what only the HTTP side sees.

A collector of our own reads `service.statistics()` once a scrape, so nothing is counted twice. Times that a client feels (first
token, between tokens, whole request) are histograms observed as events pass. Each app has a registry of its own.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pasture.api.store_metrics import store_metrics
from pasture.core.ports import Clock
from pasture.core.statistics import PoolStatistics, SchedulerStatistics, ServiceStatistics
from pasture.core.values import TokenEvent
from pasture.web import Recent

_TTFT_SECONDS = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0)
_INTER_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
_REQUEST_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)


class Metrics:
    """The registry of one app."""

    def __init__(self, statistics: Callable[[], ServiceStatistics], clock: Clock) -> None:
        self.first_token = Recent(clock)
        self.inter_token = Recent(clock)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_StatisticsCollector(statistics))
        self._first = self._histogram("pasture_time_to_first_token_seconds", "From request to first token", _TTFT_SECONDS)
        self._between = self._histogram("pasture_inter_token_seconds", "Between tokens of one reply", _INTER_TOKEN_SECONDS)
        self._whole = self._histogram("pasture_request_seconds", "From request to the end of its reply", _REQUEST_SECONDS)

    def text(self) -> bytes:
        """Everything, in the text exposition format."""
        return generate_latest(self._registry)

    async def observed(self, events: AsyncGenerator[TokenEvent, None], clock: Clock) -> AsyncGenerator[TokenEvent, None]:
        """The same events, timed. Takes over `events` and closes it."""
        start = clock()
        last: float | None = None
        async with aclosing(events):
            async for event in events:
                now = clock()
                if event.token is not None:
                    if last is None:
                        self._first.observe(now - start)
                        self.first_token.add(now - start)
                    else:
                        self._between.observe(now - last)
                        self.inter_token.add(now - last)
                    last = now
                if event.finish is not None:
                    self._whole.observe(now - start)
                yield event

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, help_text, buckets=buckets, registry=self._registry)


class _StatisticsCollector(Collector):
    def __init__(self, statistics: Callable[[], ServiceStatistics]) -> None:
        self._statistics = statistics

    def collect(self) -> Iterator[Metric]:
        statistics = self._statistics()
        yield _gauge("pasture_uptime_seconds", "Since the service started", statistics.uptime_seconds)
        yield _gauge("pasture_draining", "1 while the server takes nothing new", float(statistics.draining))
        yield _gauge("pasture_kv_bytes", "Of the live cache's buffers", statistics.live_bytes)
        yield _gauge("pasture_kv_annex_bytes", "Of the cache beside it in which prompts are computed", statistics.annex_bytes)
        yield from _pool(statistics.pool)
        yield from _scheduler(statistics.scheduler)
        yield from store_metrics(statistics.store)


def _pool(pool: PoolStatistics) -> Iterator[Metric]:
    yield _gauge("pasture_kv_cells", "Cells of the live cache", pool.shape.n_cells)
    yield _labelled_gauge(
        "pasture_kv_used_cells",
        "Cells in use, by who holds them",
        "state",
        {"running": pool.running_cells, "idle": pool.idle_cells},
    )
    yield _gauge("pasture_kv_shared_cells", "Cells that more than one sequence holds", pool.shared_cells)
    yield _gauge("pasture_kv_saved_cells", "Cells that sharing saves now", pool.saved_cells)
    yield _gauge("pasture_kv_peak_cells", "The most cells ever in use", pool.peak_cells)
    yield _gauge("pasture_kv_fragmentation_ratio", "Tokens away from their neighbours", pool.fragmentation)
    yield _gauge("pasture_sequences", "Sequences in the live cache", len(pool.sequences))
    yield _labelled_counter("pasture_prefix_hit_tokens", "Prompt tokens found, by source", "source", pool.hit_tokens)
    yield _counter("pasture_prefix_missed_tokens", "Prompt tokens that had to be computed", pool.missed_tokens)
    yield _labelled_counter("pasture_evicted_cells", "Cells evicted, by reason", "reason", pool.evicted_cells)
    yield _counter("pasture_compactions", "Times the cache was compacted", pool.compactions)


def _scheduler(scheduler: SchedulerStatistics) -> Iterator[Metric]:
    counts = {
        "waiting": scheduler.waiting,
        "prefilling": scheduler.prefilling,
        "decoding": scheduler.decoding,
        "swapped": scheduler.swapped,
    }
    yield _labelled_gauge("pasture_requests", "Requests, by state", "state", counts)
    yield _counter("pasture_requests_submitted", "Requests taken", scheduler.submitted_total)
    yield _labelled_counter("pasture_requests_finished", "Replies ended, by reason", "reason", scheduler.finished_total)
    yield _counter("pasture_requests_rejected", "Requests turned away", scheduler.rejected_total)
    yield _counter("pasture_swaps", "Requests moved out of the live cache", scheduler.swaps_total)
    yield _counter("pasture_prompt_tokens", "Prompt tokens of all requests", scheduler.prompt_tokens_total)
    yield _counter("pasture_cached_tokens", "Prompt tokens that were already there", scheduler.cached_tokens_total)
    yield _counter("pasture_computed_tokens", "Prompt tokens computed", scheduler.computed_tokens_total)
    yield _counter("pasture_generated_tokens", "Tokens generated", scheduler.generated_tokens_total)
    yield _counter("pasture_steps", "Engine steps", scheduler.steps_total)
    yield _counter("pasture_interrupted_steps", "Given up for a request that came", scheduler.interrupted_steps_total)
    yield _counter("pasture_step_seconds", "Engine-thread time", scheduler.step_seconds_total)
    yield _counter("pasture_decode_seconds", "Of that, inside llama_decode", scheduler.decode_seconds_total)
    yield _counter("pasture_sample_seconds", "Of that, sampling", scheduler.sample_seconds_total)
    yield _gauge("pasture_prefill_budget_tokens", "Prompt tokens a step may compute", scheduler.prefill_budget_tokens)
    yield _gauge("pasture_prefill_tokens_per_second", "Measured", scheduler.prefill_tokens_per_second)
    yield _counter("pasture_layout_moves", "Moves to the other layout", scheduler.layout_moves_total)
    yield _counter("pasture_shifts", "Times the live cache was rewritten in another form", scheduler.shifts_total)
    yield _counter("pasture_invariant_failures", "Accounting errors found", scheduler.invariant_failures_total)


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help_text, value=value)


def _counter(name: str, help_text: str, value: float) -> Metric:
    return CounterMetricFamily(name, help_text, value=value)


def _labelled_gauge(name: str, help_text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, help_text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _labelled_counter(name: str, help_text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(name, help_text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
