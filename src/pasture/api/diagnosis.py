"""`GET /v1/diagnosis`: what usually goes wrong with a shared cache, checked now and said in a sentence each.

    low_hit_rate       prompts are computed that could have been found
    interference       conversations could see each other: the books are verified, some of what was restored is read back and
                       compared with what was stored, damage is counted
    memory_growth      something grows past its budget: cells, tiers, what the state keeps
    memory_pressure    the machine swaps, or is about to
    slowed_by          the self-check had to turn off what would be faster, or llama.cpp was built in a slow way for this model

Everything but that verification is read from statistics.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass

import orjson
from fastapi import APIRouter
from starlette.responses import Response

from pasture.api.answers import Diagnosis
from pasture.api.gateway import Gateway
from pasture.api.openapi import described
from pasture.api.pressure import Memory, read_memory, trouble
from pasture.core.errors import InvariantBroken
from pasture.core.statistics import ServiceStatistics, Verification
from pasture.core.values import ModelInfo
from pasture.sessions.state import Sweeper

LOW_HIT_RATIO = 0.2
ENOUGH_TOKENS = 10_000
"""prompt tokens before a ratio says anything"""


@dataclass(frozen=True, slots=True)
class Check:
    """One question with its answer. `status`: ok, warning, or unknown while there is too little to go by."""

    name: str
    status: str
    message: str
    facts: dict[str, object]


def diagnosis_routes(gateway: Gateway) -> APIRouter:
    """Routes over the gateway's service and state."""
    router = APIRouter()

    @router.get(
        "/v1/diagnosis",
        **described("Operator", "Low hit rate, interference, memory growth: each checked now", Diagnosis, errors=(503,)),
    )
    async def diagnosis() -> Response:
        verified: Verification | InvariantBroken
        try:
            verified = await gateway.service.verify()
        except InvariantBroken as error:
            verified = error
        statistics = gateway.service.statistics()
        kept = await asyncio.to_thread(gateway.state.kept)
        checks = [hit_rate(statistics), interference(statistics, verified)]
        checks.append(memory_growth(statistics, kept, gateway.state.sweeper))
        checks += [memory_pressure(await asyncio.to_thread(read_memory)), slowed_by(statistics.model)]
        ok = all(check.status != "warning" for check in checks)
        return Response(orjson.dumps({"object": "diagnosis", "ok": ok, "checks": checks}), media_type="application/json")

    return router


def hit_rate(statistics: ServiceStatistics) -> Check:
    """Whether prompts are found often enough for the cache to be worth its memory."""
    pool = statistics.pool
    hit, missed = sum(pool.hit_tokens.values()), pool.missed_tokens
    ratio = hit / (hit + missed) if hit + missed else 0.0
    facts: dict[str, object] = {
        "hit_tokens": dict(pool.hit_tokens),
        "missed_tokens": missed,
        "hit_ratio": round(ratio, 4),
        "evicted_cells": dict(pool.evicted_cells),
        "fetches_refused": dict(statistics.store.gate_refusals),
    }
    if hit + missed < ENOUGH_TOKENS:
        return Check("low_hit_rate", "unknown", "too few prompts yet to tell", facts)
    if ratio >= LOW_HIT_RATIO:
        return Check("low_hit_rate", "ok", f"{ratio:.0%} of prompt tokens were found", facts)
    full = sum(pool.evicted_cells.values()) > pool.shape.n_cells
    advice = (
        "the pool is small for the traffic: a larger --kv-memory or --kv-ram keeps more"
        if full
        else "prompts differ early: something at their beginning changes (a date, a name, an order of documents)"
    )
    return Check("low_hit_rate", "warning", f"only {ratio:.0%} of prompt tokens were found; {advice}", facts)


def interference(statistics: ServiceStatistics, verified: Verification | InvariantBroken) -> Check:
    """Whether anything says that conversations could have seen each other's tokens."""
    broken = str(verified) if isinstance(verified, InvariantBroken) else None
    sample = Verification() if isinstance(verified, InvariantBroken) else verified
    damaged = sum(tier.damaged_blocks for tier in statistics.store.tiers)
    facts: dict[str, object] = {
        "books_verified": broken is None,
        "restored_tokens_compared": sample.compared_tokens,
        "restored_tokens_differing": sample.differing_tokens,
        "invariant_failures": statistics.scheduler.invariant_failures_total,
        "damaged_blocks_dropped": damaged,
        "namespaces": len(statistics.pool.namespaces),
    }
    if broken is not None or statistics.scheduler.invariant_failures_total:
        what = broken or "the books did not agree at least once; the cache was emptied then"
        return Check("interference", "warning", f"a bug to report: {what}", facts)
    if sample.differing_tokens:
        message = (
            f"a bug to report: of {sample.compared_tokens} restored tokens that were read back, {sample.differing_tokens} are "
            "not what was stored; restart the server"
        )
        return Check("interference", "warning", message, facts)
    same = (
        f", {sample.compared_tokens} restored tokens were read back and are what was stored" if sample.compared_tokens else ""
    )
    dropped = f"; {damaged} damaged stored blocks were noticed and dropped" if damaged else ""
    return Check("interference", "ok", f"every cell is accounted for and held by its own namespace alone{same}{dropped}", facts)


def memory_growth(statistics: ServiceStatistics, kept: dict[str, int], sweeper: Sweeper | None) -> Check:
    """Whether everything that grows stays within its budget, and what nobody uses is forgotten."""
    pool = statistics.pool
    over = [
        tier.name
        for tier in statistics.store.tiers
        if tier.bytes > tier.budget_bytes + tier.pinned_bytes + tier.in_flight_bytes
    ]
    facts: dict[str, object] = {
        "cells": {"used": pool.used_cells, "peak": pool.peak_cells, "of": pool.shape.n_cells},
        "tiers": {
            tier.name: {"bytes": tier.bytes, "budget_bytes": tier.budget_bytes, "pinned_bytes": tier.pinned_bytes}
            for tier in statistics.store.tiers
        },
        "state": kept,
        "sweeper": None if sweeper is None else asdict(sweeper),
    }
    if pool.used_cells > pool.shape.n_cells:
        return Check("memory_growth", "warning", "more cells are in use than there are: a bug to report", facts)
    if over:
        return Check("memory_growth", "warning", f"over budget: {', '.join(over)}", facts)
    within = "cells and tiers are within their budgets"
    if sweeper is None:
        return Check("memory_growth", "ok", within, facts)
    if sweeper.late:
        message = f"unused sessions and responses have not been looked for in {sweeper.since_seconds:.0f} s: the log says why"
        return Check("memory_growth", "warning", message, facts)
    message = f"{within}; unused sessions were looked for {sweeper.since_seconds:.0f} s ago"
    return Check("memory_growth", "ok", message, facts)


def memory_pressure(memory: Memory) -> Check:
    """Whether the machine has the memory that the model and the cache need."""
    wrong = trouble(memory)
    if wrong is None:
        return Check("memory_pressure", "ok", "nothing is swapped out, and there is memory left", asdict(memory))
    advice = "--mlock keeps the model in RAM; a smaller --kv-ram or --kv-memory leaves more room"
    return Check("memory_pressure", "warning", f"{wrong}; {advice}", asdict(memory))


def slowed_by(model: ModelInfo) -> Check:
    """Whether the model runs as fast as it could."""
    facts: dict[str, object] = {"reasons": list(model.slowed_by)}
    if not model.slowed_by:
        return Check("slowed_by", "ok", "the self-check found nothing that slows this model down", facts)
    advice = ""
    if any("turned off" in reason for reason in model.slowed_by):
        advice = "; it could be faster: a host that carries out what its processor announces does not need this"
    return Check("slowed_by", "warning", f"{'; '.join(model.slowed_by).replace(';', ',')}{advice}", facts)
