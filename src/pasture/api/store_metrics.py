"""What rests outside the live cache, in Prometheus' words: one set of names for every tier, labelled by the tier's name.

Owns the names. Labels are the tiers' names, the forms of stored KV, the kinds of transfer and the addresses of shared stores,
all of them few and fixed: no user, conversation or file is ever a label. Reads a frozen value; any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pasture.core.storage import RemoteServerStatistics, StoreStatistics, TierStatistics
from pasture.core.values import Form

_Value = Callable[[TierStatistics], float]

_GAUGES: tuple[tuple[str, str, _Value], ...] = (
    ("pasture_store_blocks", "Blocks of KV in a tier", lambda tier: tier.blocks),
    ("pasture_store_bytes", "Bytes in a tier", lambda tier: tier.bytes),
    ("pasture_store_budget_bytes", "What a tier may take", lambda tier: tier.budget_bytes),
    ("pasture_store_pinned_bytes", "Of them, what must stay for a request", lambda tier: tier.pinned_bytes),
    ("pasture_store_in_flight_bytes", "Being written or read in the background", lambda tier: tier.in_flight_bytes),
    ("pasture_store_latency_seconds", "Of a small read, measured", lambda tier: tier.latency_seconds),
    ("pasture_store_read_bytes_per_second", "Of a large read, measured", lambda tier: tier.bytes_per_second),
)

_COUNTERS: tuple[tuple[str, str, _Value], ...] = (
    ("pasture_store_hit_tokens", "Prompt tokens that a tier had", lambda tier: tier.hit_tokens),
    ("pasture_store_missed_tokens", "Prompt tokens that a tier was asked for and had not", lambda tier: tier.missed_tokens),
    ("pasture_store_written_bytes", "Written to a tier", lambda tier: tier.written_bytes),
    ("pasture_store_read_bytes", "Read from a tier", lambda tier: tier.read_bytes),
    ("pasture_store_evicted_blocks", "Removed to make room", lambda tier: tier.evicted_blocks),
    ("pasture_store_damaged_blocks", "Not what they claimed to be, and dropped", lambda tier: tier.damaged_blocks),
    ("pasture_store_errors", "Failures of a tier; each was a miss", lambda tier: tier.errors),
)


_RemoteValue = Callable[[RemoteServerStatistics], float]

_REMOTE_GAUGES: tuple[tuple[str, str, _RemoteValue], ...] = (
    ("pasture_remote_up", "Whether a shared store is asked (1) or left alone (0)", lambda s: s.state == "closed"),
    ("pasture_remote_round_trip_seconds", "Of a small question, the median", lambda s: s.round_trip_seconds),
    ("pasture_remote_slow_round_trip_seconds", "All but one in a hundred were faster", lambda s: s.slow_round_trip_seconds),
)

_REMOTE_COUNTERS: tuple[tuple[str, str, _RemoteValue], ...] = (
    ("pasture_remote_outages", "Times that a shared store went away", lambda s: s.openings),
    ("pasture_remote_failures", "Questions that it did not answer, or not in time", lambda s: s.failures),
)


def store_metrics(store: StoreStatistics) -> Iterator[Metric]:
    """Every tier, then what the cost gate goes by."""
    for name, text, value in _GAUGES:
        gauge = GaugeMetricFamily(name, text, labels=["tier"])
        for tier in store.tiers:
            gauge.add_metric([tier.name], value(tier))
        yield gauge
    yield _forms(store)
    for name, text, value in _COUNTERS:
        counter = CounterMetricFamily(name, text, labels=["tier"])
        for tier in store.tiers:
            counter.add_metric([tier.name], value(tier))
        yield counter
    yield from _remote(store)
    yield GaugeMetricFamily(
        "pasture_gate_prefill_tokens_per_second", "What recomputing is taken to cost", store.prefill_tokens_per_second
    )
    yield GaugeMetricFamily("pasture_gate_save_bytes_per_second", "Live cache to RAM, measured", store.save_bytes_per_second)
    yield GaugeMetricFamily(
        "pasture_gate_restore_bytes_per_second", "RAM to live cache, measured", store.restore_bytes_per_second
    )
    refusals = CounterMetricFamily("pasture_gate_refusals", "Transfers not made: recomputing is cheaper", labels=["kind"])
    for kind, count in store.gate_refusals.items():
        refusals.add_metric([kind], count)
    yield refusals
    yield from _foresight(store)


def _foresight(store: StoreStatistics) -> Iterator[Metric]:
    """What was brought into RAM before anybody asked, what became of it, and what guessing costs."""
    prefetch = store.prefetch
    asked = CounterMetricFamily("pasture_prefetch_conversations", "Brought from slow tiers into RAM ahead", labels=["why"])
    asked.add_metric(["hint"], prefetch.hints)
    asked.add_metric(["guess"], prefetch.guesses)
    yield asked
    for name, text, value in (
        ("pasture_prefetch_cancelled", "Times that it stopped because real work came", prefetch.cancelled),
        ("pasture_prefetch_issued_blocks", "Blocks brought into RAM ahead", prefetch.issued_blocks),
        ("pasture_prefetch_issued_bytes", "Their bytes", prefetch.issued_bytes),
        ("pasture_prefetch_used_bytes", "Of them, what a request used", prefetch.used_bytes),
        ("pasture_prefetch_wasted_bytes", "Of them, what left RAM unused", prefetch.wasted_bytes),
        ("pasture_prefetch_cpu_seconds", "CPU time of the thread that does it", prefetch.cpu_seconds),
        ("pasture_policy_cpu_seconds", "CPU time that choosing what stays in RAM took", store.policy_seconds),
    ):
        yield CounterMetricFamily(name, text, value)


def _remote(store: StoreStatistics) -> Iterator[Metric]:
    servers = [server for tier in store.tiers if tier.remote is not None for server in tier.remote.servers]
    for name, text, value in _REMOTE_GAUGES if servers else ():
        gauge = GaugeMetricFamily(name, text, labels=["server"])
        for server in servers:
            gauge.add_metric([server.address], value(server))
        yield gauge
    for name, text, value in _REMOTE_COUNTERS if servers else ():
        counter = CounterMetricFamily(name, text, labels=["server"])
        for server in servers:
            counter.add_metric([server.address], value(server))
        yield counter


def _forms(store: StoreStatistics) -> Metric:
    family = GaugeMetricFamily("pasture_store_form_bytes", "Bytes in a tier by form of KV", labels=["tier", "form"])
    for tier in store.tiers:
        for form in Form:
            family.add_metric([tier.name, form.value], tier.bytes_by_form.get(form, 0))
    return family
