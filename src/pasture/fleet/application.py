"""The cluster on Ray Serve: an application for each replica, so that each keeps its name, and one for all ingresses.

    pasture-r1, pasture-r2, ...     one Serve replica each; Serve starts it again wherever there is room when it dies or hangs
    pasture-ingress                 as many Serve replicas as there are ingresses

Serve decides where they live and whether they are well. Requests do not pass through it: clients talk to the ingresses, and
these to the replicas. Functions here are called by commands that are connected to Ray.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from pasture.cluster.link import ReplicaLost, open_link
from pasture.cluster.members import Member
from pasture.cluster.values import ReplicaId
from pasture.core.errors import ConfigError, EngineError
from pasture.fleet.directory import Blueprint, RayDirectory, find_directory, make_directory
from pasture.fleet.ingress import RunningIngress
from pasture.fleet.replica import RunningReplica

logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it tells of every step, to people who asked for the result

APPLICATION = "pasture-"
INGRESS = f"{APPLICATION}ingress"
HEALTH_SECONDS = 1.0
HEALTH_TIMEOUT_SECONDS = 15.0
NOTICED_SECONDS = 0.6
"""after which every ingress knows what the directory says"""


class Replica:
    """What Serve holds: one start of one replica."""

    def __init__(self, name: str) -> None:
        logging.getLogger("pasture").setLevel(logging.INFO)
        directory = find_directory()
        blueprint = directory.blueprint()
        host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._running = RunningReplica(name, blueprint.settings, blueprint.key, host, directory)

    def check_health(self) -> None:
        self._running.check()

    def __del__(self) -> None:
        if hasattr(self, "_running"):
            self._running.close()


class Ingress:
    """What Serve holds: one ingress."""

    def __init__(self) -> None:
        directory = find_directory()
        blueprint = directory.blueprint()
        self._running = RunningIngress(blueprint.settings, blueprint.key, directory)

    def check_health(self) -> None:
        self._running.check()

    def __del__(self) -> None:
        if hasattr(self, "_running"):
            self._running.close()


@dataclass(frozen=True, slots=True)
class Part:
    """One application, for people."""

    name: str
    status: str
    message: str


def up(blueprint: Blueprint, n_replicas: int) -> None:
    """Start everything and wait until it serves. Raises ConfigError where a cluster is up, EngineError where a part fails."""
    make_directory(blueprint)
    serve.start(detached=True, proxy_location="Disabled")
    targets = [_replica_target(name, blueprint) for name in _names(n_replicas)]
    _run([*targets, _ingress_target(blueprint)])


def scale(n_replicas: int) -> dict[str, dict[str, object]]:
    """Have so many replicas; those that go are drained first. Returns what was carried, by replica."""
    blueprint = find_directory().blueprint()
    there = replicas()
    wanted = list(there[:n_replicas])
    for name in _names(n_replicas + len(there)):
        if len(wanted) < n_replicas and name not in wanted:
            wanted.append(name)
    _run([_replica_target(name, blueprint) for name in wanted if name not in there])
    return drain([ReplicaId(name) for name in there if name not in wanted])


def drain(names: Sequence[ReplicaId]) -> dict[str, dict[str, object]]:
    """Take replicas out: nothing new, what runs may finish, their conversations go to the others, then they end."""
    if not names:
        return {}
    return asyncio.run(_drain(find_directory(), names))


def cordon(names: Sequence[ReplicaId]) -> None:
    """From now on these get nothing new; what they hold can still be had from them. Ends with their next start."""
    asyncio.run(_cordon(find_directory(), names))


def down() -> None:
    """End every part."""
    directory = find_directory()
    for part in status():
        serve.delete(part.name, _blocking=False)
    serve.shutdown()  # type: ignore[no-untyped-call]
    directory.end()


def status() -> list[Part]:
    """What Serve says of every part."""
    found = serve.status().applications
    return [
        Part(name, application.status.value, application.message)
        for name, application in sorted(found.items())
        if name.startswith(APPLICATION)
    ]


def replicas() -> list[str]:
    """The names of those that there should be, in the order of their numbers."""
    names = [part.name.removeprefix(APPLICATION) for part in status() if part.name != INGRESS]
    return sorted(names, key=lambda name: (len(name), name))


async def members() -> list[Member]:
    """Who is on the list."""
    return list(await find_directory().members())


def chosen(known: Sequence[Member], wanted: str) -> list[ReplicaId]:
    """Replicas by their own name, or all of a node by its name or address. Raises ConfigError for a name of neither."""
    found = [member.replica for member in known if wanted in (member.replica, member.node, member.host)]
    if not found:
        there = ", ".join(f"{member.replica} on {member.node} ({member.host})" for member in known) or "nobody"
        raise ConfigError(f"there is no replica or node {wanted}; there is: {there}")
    return found


async def _cordon(directory: RayDirectory, names: Sequence[ReplicaId]) -> None:
    for name in names:
        await directory.drain(name)
    await asyncio.sleep(NOTICED_SECONDS)


async def _drain(directory: RayDirectory, names: Sequence[ReplicaId]) -> dict[str, dict[str, object]]:
    key = directory.blueprint().key
    await _cordon(directory, names)
    known = {member.replica: member for member in await directory.members()}
    well = {part.name for part in status() if part.status == ApplicationStatus.RUNNING.value}
    stay = [member for member in known.values() if not member.draining and f"{APPLICATION}{member.replica}" in well]
    if not stay:
        raise ConfigError("no other replica is there that could take over; `pasture cluster scale` makes one")
    told: dict[str, dict[str, object]] = {}
    for name in names:
        if name in known:
            told[name] = await _hand_over(known[name], key, stay)
        await asyncio.to_thread(serve.delete, f"{APPLICATION}{name}")
    return told


async def _hand_over(member: Member, key: bytes, stay: list[Member]) -> dict[str, object]:
    try:
        link = await open_link(member, key)
        try:
            return dict(await link.hand_over(stay))
        finally:
            link.close()
    except ReplicaLost as lost:
        return {"error": str(lost)}


def _names(n: int) -> list[str]:
    return [f"r{number}" for number in range(1, n + 1)]


def _replica_target(name: str, blueprint: Blueprint) -> serve.RunTarget:
    deployment = serve.deployment(
        name="replica",
        num_replicas=1,
        ray_actor_options={"num_cpus": blueprint.replica_cpus, "num_gpus": blueprint.replica_gpus},
        health_check_period_s=HEALTH_SECONDS,
        health_check_timeout_s=HEALTH_TIMEOUT_SECONDS,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=blueprint.settings.drain_timeout + 5.0,
    )
    return serve.RunTarget(deployment(Replica).bind(name), name=f"{APPLICATION}{name}", route_prefix=None)


def _ingress_target(blueprint: Blueprint) -> serve.RunTarget:
    deployment = serve.deployment(
        name="ingress",
        num_replicas=blueprint.n_ingresses,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=HEALTH_SECONDS,
        health_check_timeout_s=HEALTH_TIMEOUT_SECONDS,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=blueprint.settings.drain_timeout + 5.0,
    )
    return serve.RunTarget(deployment(Ingress).bind(), name=INGRESS, route_prefix=None)


def _run(targets: Sequence[serve.RunTarget]) -> None:
    """Raises EngineError with Serve's reason for a part that does not come up."""
    if not targets:
        return
    try:
        serve.run_many(targets)
    except RuntimeError as error:
        failed = [part for part in status() if part.status != ApplicationStatus.RUNNING.value]
        reason = failed[0].message.strip().splitlines()[-1] if failed and failed[0].message.strip() else str(error)
        raise EngineError(f"{failed[0].name if failed else 'the cluster'} does not start: {reason}") from None
