"""One replica in its process: the single machine's engine and store, behind the cluster's socket.

    engine thread     the service's                 loop thread     the socket, the news, a line to the directory each second

Nothing here knows Ray: the directory is a port. A start is an epoch; what a replica holds in RAM goes with its process, what
is on its disk it finds again and reports.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import time

from pasture.cluster.journal import Journal
from pasture.cluster.members import Directory, Identity, Member, vocabulary_mark
from pasture.cluster.serving import ReplicaServer
from pasture.cluster.values import Epoch, ReplicaId
from pasture.config import Settings
from pasture.core.errors import EngineError
from pasture.fleet.loops import LoopThread
from pasture.server import service_over, settle, start_engine
from pasture.tiers.eviction import PolicyMaker
from pasture.tiers.watching import watched

log = logging.getLogger(__name__)

JOIN_SECONDS = 1.0
STOP_SECONDS = 10.0


class RunningReplica:
    """Loads the model at once; serves when it is made. `close` ends it."""

    def __init__(self, name: str, settings: Settings, key: bytes, host: str, directory: Directory) -> None:
        """`host`: this machine's address on the private network; the port is any free one."""
        engine = start_engine(settings)
        fingerprint, vocabulary = engine.codec.fingerprint.hex(), engine.vocabulary
        journal = Journal(ReplicaId(name), Epoch(time.time_ns()))

        def watch(policy: PolicyMaker) -> PolicyMaker:
            return watched(policy, journal)

        self._service = service_over(engine, settings, watch=watch)
        identity = Identity(
            self._service.model, fingerprint, vocabulary_mark(vocabulary), self._service.max_conversation_tokens
        )
        self._directory = directory
        self._loop = LoopThread("pasture-replica")
        self._server = ReplicaServer(self._service, identity, journal, key)
        port = self._loop.call(self._server.start(host))
        self.member = Member(journal.replica, journal.epoch, host, port, platform.node(), os.getpid())
        asyncio.run_coroutine_threadsafe(self._keep_joining(), self._loop.loop)
        settle()

    def check(self) -> None:
        """Raises EngineError when it cannot serve any more, and should be replaced."""
        if not self._loop.alive or not (self._service.ready or self._service.statistics().draining):
            raise EngineError("the engine has ended")

    def close(self) -> None:
        """What runs is lost to this replica; the ingresses have it go on elsewhere."""
        try:
            self._loop.call(self._end(), STOP_SECONDS)
        except Exception as error:
            log.warning("the replica did not say goodbye: %s", error or type(error).__name__)
        self._service.close()
        self._loop.stop()

    async def _end(self) -> None:
        await self._server.stop()
        await self._directory.leave(self.member.replica, self.member.epoch)

    async def _keep_joining(self) -> None:
        while True:
            try:
                await self._directory.join(self.member)
            except Exception as error:  # whatever the directory is made of may fail for a while
                log.warning("the directory cannot be reached: %s", error)
            await asyncio.sleep(JOIN_SECONDS)
