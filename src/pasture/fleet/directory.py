"""The cluster's directory as a named Ray actor: who is there, what everybody was started with, and the cluster's key.

It holds soft state only: Ray restarts it with the arguments it was made with, and the replicas put themselves on its list
again. Who reaches Ray can read the key; nobody else can. `RayDirectory` is what the rest of the cluster sees of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import ray

from pasture.cluster.members import Member
from pasture.cluster.register import Register
from pasture.cluster.values import Epoch, ReplicaId
from pasture.config import Settings
from pasture.core.errors import ConfigError

NAMESPACE = "pasture"
NAME = "directory"


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What a cluster was started with."""

    settings: Settings
    key: bytes
    """that its members recognise each other by"""
    n_ingresses: int
    replica_cpus: float = 0.0
    """of a node that Ray counts for a replica"""
    replica_gpus: float = 0.0


class DirectoryActor(Register):
    """The register, in a process of its own."""

    def __init__(self, blueprint: Blueprint) -> None:
        super().__init__()
        self._blueprint = blueprint

    def blueprint(self) -> Blueprint:
        return self._blueprint


class RayDirectory:
    """See `pasture.cluster.members.Directory`. Any loop of a process that is connected to Ray."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def join(self, member: Member) -> None:
        await self._handle.join.remote(member)

    async def leave(self, replica: ReplicaId, epoch: Epoch) -> None:
        await self._handle.leave.remote(replica, epoch)

    async def drain(self, replica: ReplicaId) -> None:
        await self._handle.drain.remote(replica)

    async def members(self) -> Sequence[Member]:
        return cast(Sequence[Member], await self._handle.members.remote())

    def blueprint(self) -> Blueprint:
        """Waits for it."""
        return cast(Blueprint, ray.get(self._handle.blueprint.remote()))

    def end(self) -> None:
        """There is no such cluster any more."""
        ray.kill(self._handle, no_restart=True)


def make_directory(blueprint: Blueprint) -> RayDirectory:
    """Raises ConfigError when there is a cluster of pasture on this Ray already."""
    actor = ray.remote(DirectoryActor)
    options = {"name": NAME, "namespace": NAMESPACE, "lifetime": "detached", "max_restarts": -1, "num_cpus": 0}
    try:
        handle = actor.options(**options).remote(blueprint)
    except ValueError:
        raise ConfigError("there is a cluster of pasture on this Ray already: `pasture cluster down` ends it") from None
    return RayDirectory(handle)


def find_directory() -> RayDirectory:
    """Raises ConfigError when there is none."""
    try:
        return RayDirectory(ray.get_actor(NAME, namespace=NAMESPACE))
    except ValueError:
        raise ConfigError("there is no cluster of pasture on this Ray: `pasture cluster up` starts one") from None
