"""What an ingress tells the operator of its cluster: `GET /v1/admin/cluster`, and its figures in `/metrics`.

replicas    who this ingress is connected to, since when, what is in flight there, how many blocks are known to be there
router      why requests went where they went, and how many went on after their replica was lost
"""

from __future__ import annotations

import time
from dataclasses import asdict

import orjson
from fastapi import APIRouter
from starlette.responses import Response

from pasture.cluster.service import ClusterService
from pasture.cluster.values import ReplicaId

REPLICA_FIELDS = (
    "replica",
    "node",
    "seconds",
    "draining",
    "running",
    "uncached_tokens",
    "known_blocks",
    "used_cells",
    "cells",
)


def cluster_routes(service: ClusterService) -> APIRouter:
    """For the admin key alone, as everything below `/v1/admin`."""
    router = APIRouter(prefix="/v1/admin")

    @router.get("/cluster", include_in_schema=False)
    async def cluster() -> Response:
        return Response(orjson.dumps(describe(service)), media_type="application/json")

    return router


def describe(service: ClusterService) -> dict[str, object]:
    """As JSON."""
    routed = service.router.statistics()
    taking = set(service.router.replicas())
    replicas = [
        {
            "replica": name,
            "node": link.member.node,
            "host": link.member.host,
            "port": link.member.port,
            "pid": link.member.pid,
            "epoch": link.member.epoch,
            "seconds": round(time.time() - link.member.epoch / 1e9, 1),
            "draining": name not in taking,
            "running": _running(service, name),
            "uncached_tokens": routed.uncached_tokens.get(name, 0),
            "known_blocks": service.router.known_blocks(name),
            "fingerprint": link.identity.fingerprint[:16],
        }
        for name, link in sorted(service.links.open.items())
    ]
    told = asdict(routed) | {"decisions": {reason.value: n for reason, n in routed.decisions.items()}}
    return {"object": "cluster", "replicas": replicas, "router": told, "survived_losses": service.survived}


def picture(service: ClusterService) -> dict[str, object]:
    """What the dashboard draws of the cluster, without addresses. `REPLICA_FIELDS` names the columns."""
    routed = service.router.statistics()
    taking = set(service.router.replicas())
    rows = []
    for name, link in sorted(service.links.open.items()):
        pool = None if (found := service.links.statistics.get(name)) is None else found.pool
        rows.append(
            [
                name,
                link.member.node,
                round(time.time() - link.member.epoch / 1e9, 1),
                name not in taking,
                _running(service, name),
                routed.uncached_tokens.get(name, 0),
                service.router.known_blocks(name),
                0 if pool is None else pool.used_cells,
                0 if pool is None else pool.shape.n_cells,
            ]
        )
    decisions = {reason.value: n for reason, n in routed.decisions.items() if n}
    return {"replicas": rows, "decisions": decisions, "pulls": routed.pulls, "survived": service.survived}


def _running(service: ClusterService, name: ReplicaId) -> int:
    """Requests that wait or generate there, through whichever ingress; as of its last report."""
    found = service.links.statistics.get(name)
    if found is None:
        return 0
    scheduler = found.scheduler
    return scheduler.waiting + scheduler.prefilling + scheduler.decoding + scheduler.swapped
