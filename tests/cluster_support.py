"""A cluster in one process: replicas with fake engines behind real sockets, a directory in memory, an ingress' service."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from pasture.cluster.journal import Journal
from pasture.cluster.members import Identity, Member, vocabulary_mark
from pasture.cluster.register import Register
from pasture.cluster.service import ClusterService, ClusterSettings
from pasture.cluster.serving import ReplicaServer
from pasture.cluster.values import Epoch, ReplicaId
from pasture.core.ports import Service
from pasture.core.values import Finish, PoolShape, Request, RequestId, SamplingParams, StepPlan, StepResult, TokenEvent
from pasture.engine.fake import FakeEngine
from pasture.scheduler.service import LocalService
from pasture.scheduler.settings import SchedulerSettings
from pasture.tiers.eviction import least_recently_used
from pasture.tiers.gate import OpenGate
from pasture.tiers.store import open_store
from pasture.tiers.watching import watched

KEY = b"the key of the tests"
GREEDY = SamplingParams(temperature=0)
_epochs = itertools.count(1)


class MemoryDirectory:
    """A register on this loop; see `pasture.cluster.members.Directory`."""

    def __init__(self) -> None:
        self._register = Register()

    async def join(self, member: Member) -> None:
        self._register.join(member)

    async def leave(self, replica: ReplicaId, epoch: Epoch) -> None:
        self._register.leave(replica, epoch)

    async def drain(self, replica: ReplicaId) -> None:
        self._register.drain(replica)

    async def members(self) -> Sequence[Member]:
        return self._register.members()


class TiringEngine(FakeEngine):
    """Dawdles after so many steps, so that a reply is under way for as long as a test needs, however slow the machine.

    Whoever waits for the end of a step, to close the service, waits a fifth of a second at most.
    """

    def __init__(self, n_quick_steps: int) -> None:
        super().__init__(PoolShape(8192, 64))
        self._n_quick_steps = n_quick_steps
        self.rested = False

    def execute(self, plan: StepPlan) -> StepResult:
        if plan.works:
            self._n_quick_steps -= 1
            if self._n_quick_steps < 0 and not self.rested:
                time.sleep(0.2)
        return super().execute(plan)


class Replica:
    """One start of a replica, on this loop."""

    def __init__(self, name: str, engine: FakeEngine) -> None:
        self.engine = engine
        self.journal = Journal(ReplicaId(name), Epoch(next(_epochs)))
        store = open_store(
            engine.codec,
            1 << 28,
            divisible=True,
            gate=OpenGate(engine.model.cell_bytes),
            policy=watched(least_recently_used, self.journal),
        )
        self.service = LocalService(engine, store, SchedulerSettings(check_invariants=True, expire_seconds=3600.0))
        fingerprint = engine.codec.fingerprint.hex()
        limit = self.service.max_conversation_tokens
        identity = Identity(engine.model, fingerprint, vocabulary_mark(engine.vocabulary), limit)
        self.server = ReplicaServer(self.service, identity, self.journal, KEY)
        self.member = Member(self.journal.replica, self.journal.epoch, "127.0.0.1", 0)

    async def start(self, register: MemoryDirectory) -> None:
        self.member = replace(self.member, port=await self.server.start("127.0.0.1"))
        await register.join(self.member)

    async def die(self) -> None:
        """As a killed process does: connections break, nothing is said."""
        await self.server.stop()
        await asyncio.to_thread(self.service.close)


class Fleet:
    """Replicas by name, and one ingress' service over them."""

    def __init__(self, engines: Sequence[FakeEngine], settings: ClusterSettings | None = None) -> None:
        self.register = MemoryDirectory()
        self.replicas = {f"r{n}": Replica(f"r{n}", engine) for n, engine in enumerate(engines)}
        engine = engines[0]
        self.service = ClusterService(engine.model, engine.vocabulary, self.register, KEY, settings)

    def another_ingress(self) -> ClusterService:
        """Over the same replicas; the caller's to close."""
        engine = next(iter(self.replicas.values())).engine
        return ClusterService(engine.model, engine.vocabulary, self.register, KEY)

    async def start(self) -> None:
        for replica in self.replicas.values():
            await replica.start(self.register)
        self.service.start()
        await self.settled(len(self.replicas))

    async def settled(self, n_replicas: int) -> None:
        """Wait until so many replicas take requests."""
        await until(lambda: len(self.service.router.replicas()) == n_replicas)

    def rest(self) -> None:
        """From now on no engine dawdles."""
        for replica in self.replicas.values():
            if isinstance(replica.engine, TiringEngine):
                replica.engine.rested = True

    async def restart(self, name: str, engine: FakeEngine) -> None:
        """The replica again, empty, as another start."""
        self.replicas[name] = Replica(name, engine)
        await self.replicas[name].start(self.register)

    async def stop(self) -> None:
        self.service.close()
        for replica in self.replicas.values():
            await replica.die()
        await asyncio.sleep(0)


@asynccontextmanager
async def fleet(*engines: FakeEngine, settings: ClusterSettings | None = None) -> AsyncGenerator[Fleet, None]:
    """Of these engines; two of the usual size where none is given."""
    made = Fleet(engines or (usual(), usual()), settings)
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


async def until(check: Callable[[], object]) -> None:
    """Let the others go on until it is so; fails when it takes very long."""
    for _ in range(2000):
        if check():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came to that")


def usual() -> FakeEngine:
    return FakeEngine(PoolShape(8192, 64))


def request(name: str, prompt: Sequence[int], max_tokens: int = 8, params: SamplingParams = GREEDY) -> Request:
    return Request(RequestId(name), tuple(prompt), max_tokens, params)


async def collect(service: Service, asked: Request) -> tuple[list[int], Finish]:
    """The tokens of the whole reply, and its end."""
    tokens: list[int] = []
    async for event in service.generate(asked):
        if event.token is not None:
            tokens.append(event.token)
        if event.finish is not None:
            return tokens, event.finish
    raise AssertionError("a stream without an end")


def last(events: Sequence[TokenEvent]) -> Finish:
    finish = events[-1].finish
    assert finish is not None
    return finish
