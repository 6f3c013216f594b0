"""What a system counts about itself, read from its `/metrics` in Prometheus' text format.

Knows the names of the few counters of pasture that the benchmark checks its own figures with. Labels are summed over. A
server without such a page counts nothing: an empty mapping.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

from pasture.bench.client import Endpoint, call, call_json
from pasture.bench.systems import SystemFailed

COMPUTED_TOKENS = "pasture_computed_tokens_total"
PEAK_CELLS = "pasture_kv_peak_cells"
SHARED_CELLS = "pasture_kv_shared_cells"
SAVED_CELLS = "pasture_kv_saved_cells"
USED_CELLS = "pasture_kv_used_cells"
GENERATED_TOKENS = "pasture_generated_tokens_total"
DECODING_REQUESTS = "pasture_requests:decoding"
SAMPLE_SECONDS = "pasture_sample_seconds_total"
LAYOUT_MOVES = "pasture_layout_moves_total"
STEPS = "pasture_steps_total"
STEP_SECONDS = "pasture_step_seconds_total"
DECODE_SECONDS = "pasture_decode_seconds_total"
PREFETCH_CPU_SECONDS = "pasture_prefetch_cpu_seconds_total"
POLICY_CPU_SECONDS = "pasture_policy_cpu_seconds_total"

Counters = Mapping[str, float]


async def counters(endpoint: Endpoint) -> Counters:
    """Every sample by name, summed over its labels, and by `name:label value`."""
    try:
        status, body = await call(endpoint, "/metrics")
    except OSError:
        return {}
    return parse(body.decode(errors="replace")) if status == 200 else {}


async def cell_bytes(endpoint: Endpoint) -> int:
    """What a token's KV takes in pasture's live cache. Raises SystemFailed for a server that does not tell."""
    kv = (await call_json(endpoint, "/props") or {}).get("kv")
    found = kv.get("cell_bytes") if isinstance(kv, dict) else None
    if not isinstance(found, int):
        raise SystemFailed(f"{endpoint.url} does not tell how large a cell is")
    return found


def parse(text: str) -> Counters:
    """Samples of a Prometheus page; text that is not one counts nothing."""
    totals: dict[str, float] = defaultdict(float)
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                totals[sample.name] += sample.value
                for value in sample.labels.values():
                    totals[f"{sample.name}:{value}"] += sample.value
    except ValueError:
        return {}
    return dict(totals)


def increase(before: Counters, after: Counters, name: str) -> float | None:
    """How much a counter grew; None where it is not counted."""
    return after[name] - before.get(name, 0.0) if name in after else None
