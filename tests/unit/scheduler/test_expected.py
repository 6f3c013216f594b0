"""The service and its store over the fake engine: who waits is known, and what slow tiers have rises before it is asked for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import pytest

from pasture.core.storage import BlockKey
from pasture.core.values import DEFAULT_NAMESPACE, Kind, PoolShape, Request, RequestId, SamplingParams
from pasture.engine.fake import FakeEngine
from pasture.foresight.expected import ExpectedSaving
from pasture.kv.radix import token_array
from pasture.scheduler.service import LocalService
from pasture.scheduler.settings import SchedulerSettings
from pasture.tiers import prefetch
from pasture.tiers.eviction import Wanted
from pasture.tiers.gate import OpenGate
from pasture.tiers.store import TieredStore, open_store
from tests.tier_support import ShelfTier

PROMPT = tuple(i % 250 for i in range(300))


class Recording(ExpectedSaving):
    """Foresight, with what it was told."""

    def __init__(self, wanted: Wanted) -> None:
        super().__init__(wanted, time.monotonic)
        self.arrivals: list[int] = []
        self.endings: list[tuple[int, Kind]] = []

    def arrived(self, path: Sequence[BlockKey]) -> None:
        self.arrivals.append(len(path))
        super().arrived(path)

    def finished(self, path: Sequence[BlockKey], kind: Kind) -> None:
        self.endings.append((len(path), kind))
        super().finished(path, kind)


class World:
    def __init__(self) -> None:
        self.engine = FakeEngine(PoolShape(4096, 16))
        self.shelf = ShelfTier()
        self.policies: list[Recording] = []
        self.store: TieredStore = open_store(
            self.engine.codec, 1 << 24, divisible=True, cell_bytes=24, slow=(self.shelf,), gate=OpenGate(24), policy=self.policy
        )
        self.service = LocalService(self.engine, self.store, SchedulerSettings(check_invariants=True))

    def policy(self, wanted: Wanted) -> Recording:
        self.policies.append(Recording(wanted))
        return self.policies[-1]

    @property
    def arrivals(self) -> list[int]:
        return [arrival for policy in self.policies for arrival in policy.arrivals]

    @property
    def endings(self) -> list[tuple[int, Kind]]:
        return [ending for policy in self.policies for ending in policy.endings]

    async def ask(self, prompt: tuple[int, ...], max_tokens: int = 30, kind: Kind = Kind.CHAT) -> None:
        request = Request(RequestId(f"r{len(prompt)}"), prompt, max_tokens, SamplingParams(temperature=0.0), expects=kind)
        async for _ in self.service.generate(request):
            pass


async def eventually(holds: Callable[[], bool]) -> None:
    for _ in range(2000):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to that")


async def test_the_model_hears_of_every_request_its_reply_and_what_is_expected_next() -> None:
    world = World()
    await world.ask(PROMPT, kind=Kind.TOOL)
    await world.ask(PROMPT[:200], 0)  # who wants no reply is no reader: it neither arrives nor ends
    await eventually(lambda: len(world.endings) == 1)
    assert world.arrivals == [5]
    assert world.endings == [(6, Kind.TOOL)], "the reply has grown into another block"
    world.service.close()


async def test_a_hint_brings_a_conversation_back_from_the_slow_tier() -> None:
    first = World()
    await first.ask(PROMPT)
    first.service.close()  # what is live goes to the slow tier
    assert first.shelf.blocks
    second = World()
    second.shelf.blocks = first.shelf.blocks
    assert second.store.reach(DEFAULT_NAMESPACE, token_array(PROMPT)) == 0
    await second.service.prefetch(DEFAULT_NAMESPACE, PROMPT)
    found = await second.service.locate(DEFAULT_NAMESPACE, PROMPT)
    assert (found.live_tokens, found.ram_tokens) == (0, 300)
    await second.ask(PROMPT)
    statistics = second.service.statistics().store.prefetch
    assert statistics.hints == 1
    assert statistics.used_bytes == statistics.issued_bytes > 0
    second.service.close()


async def test_without_a_slow_tier_a_hint_is_over_at_once() -> None:
    engine = FakeEngine(PoolShape(4096, 16))
    store = open_store(engine.codec, 1 << 24, divisible=True, cell_bytes=24)
    service = LocalService(engine, store, SchedulerSettings())
    await asyncio.wait_for(service.prefetch(DEFAULT_NAMESPACE, PROMPT), 20)
    service.close()


async def test_who_is_expected_is_lifted_without_anybody_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "RATE_FLOOR", 0.0)
    monkeypatch.setattr(prefetch, "SHORTEST_WAIT_SECONDS", 0.0)
    world = World()
    await world.ask(PROMPT)
    path = token_array(PROMPT)
    await eventually(lambda: world.store.reach(DEFAULT_NAMESPACE, path) == len(path))  # copied when idle
    assert await asyncio.to_thread(world.store.flush, 10.0)
    budget = world.store._memory.budget_bytes
    world.store._memory.resize(0)  # RAM is short for a moment
    assert world.store.reach(DEFAULT_NAMESPACE, path) == 0
    world.store._memory.resize(budget)
    await eventually(lambda: world.store.reach(DEFAULT_NAMESPACE, path) >= 256)
    assert world.service.statistics().store.prefetch.issued_blocks > 0
    world.service.close()


async def test_what_the_policy_costs_is_counted() -> None:
    world = World()
    await world.ask(PROMPT)
    await eventually(lambda: len(world.endings) == 1)
    assert world.service.statistics().store.policy_seconds > 0
    world.service.close()
