"""Two services with one shared store between them: what one has computed, the other restores, and nothing else changes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path

import pytest

from pasture.core.ports import Engine
from pasture.core.values import Layout, PoolShape, Request, RequestId, SamplingParams, Usage
from pasture.engine.fake import FakeEngine, expected_reply
from pasture.engine.fakecodec import FakeCodec
from pasture.scheduler.service import LocalService
from pasture.scheduler.settings import SchedulerSettings
from pasture.tiers.remote import RemoteTier
from pasture.tiers.sealed import SealedWire
from pasture.tiers.wire import Wire
from tests.engine_support import open_small
from tests.gguf_factory import write_falcon_h1, write_gemma3, write_llama, write_mamba
from tests.remote_support import (
    PATIENCE_SECONDS,
    Fleet,
    Process,
    connected,
    shelf_in_mooncake,
    shelf_in_redis,
    states,
    wait_for,
)
from tests.store_support import store_for

Writer = Callable[[Path], Path]
PROMPT = [5 + i * 7 % 200 for i in range(600)]
N_REPLY = 6
GREEDY = SamplingParams(temperature=0.0)
_serial = count()


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    fleet = Fleet()
    yield fleet
    fleet.close()


@pytest.fixture(params=["redis", "mooncake"])
def store(request: pytest.FixtureRequest, fleet: Fleet) -> tuple[str, Process]:
    return request.param, fleet.redis() if request.param == "redis" else fleet.mooncake()


def tier_over(fleet: Fleet, store: tuple[str, Process], wire: Wire | None = None, lookup_seconds: float = 5.0) -> RemoteTier:
    kind, process = store
    shelf = shelf_in_redis(process.port) if kind == "redis" else shelf_in_mooncake(process.port)
    return connected(fleet.tier(shelf, wire=wire, list_all=kind == "redis", lookup_seconds=lookup_seconds))


def fake_engine(model: bytes = b"the fake engine") -> FakeEngine:
    engine = FakeEngine(PoolShape(n_cells=4096, n_seqs=8, layout=Layout.UNIFIED, n_batch=256))
    engine.codec = FakeCodec(model)
    return engine


class Server:
    """A service, of which idle conversations leave the live cache at once, and the store that they leave for."""

    def __init__(self, engine: Engine, tier: RemoteTier) -> None:
        self.store = store_for(engine, 1 << 28, [tier])
        self.service = LocalService(engine, self.store, SchedulerSettings(check_invariants=True, idle_live_seconds=0.0))

    def close(self) -> None:
        self.service.close()


async def ask(server: Server, prompt: Sequence[int]) -> tuple[list[int], Usage]:
    request = Request(RequestId(f"r{next(_serial)}"), tuple(prompt), N_REPLY, GREEDY)
    reply: list[int] = []
    async for event in server.service.generate(request):
        if event.token is not None:
            reply.append(event.token)
        if event.finish is not None:
            assert event.finish.error is None
            return reply, event.finish.usage
    raise AssertionError("a stream without an end")


async def computed_and_sent(server: Server, prompt: Sequence[int]) -> list[int]:
    """The reply; when this returns, the shared store has the conversation."""
    left_before = server.service.statistics().pool.evicted_cells.get("idle", 0)
    reply, _ = await ask(server, prompt)
    await ask(server, [9, 9, 9])  # a step, in which what is idle leaves
    await asyncio.to_thread(
        wait_for, lambda: server.service.statistics().pool.evicted_cells.get("idle", 0) - left_before >= len(prompt)
    )
    await asyncio.to_thread(wait_for, lambda: server.store.flush(20.0), "sending")
    return reply


async def test_a_conversation_goes_on_at_another_server(fleet: Fleet, store: tuple[str, Process]) -> None:
    here, there = tier_over(fleet, store), tier_over(fleet, store)
    one, other = Server(fake_engine(), here), Server(fake_engine(), there)
    reply = await computed_and_sent(one, PROMPT)
    turn = [*PROMPT, *reply, 11, 12, 13]
    again, usage = await ask(other, turn)
    assert usage.cached_tokens >= len(PROMPT) + len(reply) - 1, "at most one old token is computed again"
    assert again == expected_reply(turn, N_REPLY, GREEDY)
    assert there.statistics().hit_tokens >= len(PROMPT)
    one.close()
    other.close()


async def test_another_model_reads_nothing_and_neither_does_who_lacks_the_key(fleet: Fleet) -> None:
    store = ("redis", fleet.redis())
    sealed = tier_over(fleet, store, SealedWire(b"s" * 32))
    one = Server(fake_engine(), sealed)
    await computed_and_sent(one, PROMPT)
    for engine, wire, n_cached in (
        (fake_engine(b"the next version"), SealedWire(b"s" * 32), 0),
        (fake_engine(), SealedWire(b"t" * 32), 0),
        (fake_engine(), None, 0),
        (fake_engine(), SealedWire(b"s" * 32), len(PROMPT) - 1),
    ):
        tier = tier_over(fleet, store, wire)
        other = Server(engine, tier)
        reply, usage = await ask(other, PROMPT)
        assert usage.cached_tokens == n_cached
        assert reply == expected_reply(PROMPT, N_REPLY, GREEDY)
        assert tier.statistics().damaged_blocks == 0, "not found, rather than found and refused"
        other.close()
    one.close()


async def test_no_request_fails_whatever_happens_to_the_store(fleet: Fleet, store: tuple[str, Process]) -> None:
    _, process = store
    tiers = [tier_over(fleet, store, lookup_seconds=0.25) for _ in range(2)]
    servers = [Server(fake_engine(), tier) for tier in tiers]
    frozen_or_dead = (process.freeze, process.thaw, process.kill, process.start)
    for number, happens in enumerate((lambda: None, *frozen_or_dead)):
        happens()
        for server in (*servers, *reversed(servers)):
            prompt = [*PROMPT[: 200 + 100 * number], 17 + number]
            reply, _ = await ask(server, prompt)
            assert reply == expected_reply(prompt, N_REPLY, GREEDY)
    for tier in tiers:
        connected(tier)
    started = time.monotonic()
    for number in count():  # a pool whose master has just come back has no room until its nodes have noticed
        prompt = [33 + number, *PROMPT]
        await computed_and_sent(servers[0], prompt)
        reply, usage = await ask(servers[1], prompt)
        assert reply == expected_reply(prompt, N_REPLY, GREEDY)
        if usage.cached_tokens > 0:
            break
        assert time.monotonic() - started < PATIENCE_SECONDS, "and it is of use again"
        await asyncio.sleep(0.1)
    for server in servers:
        server.close()


@pytest.mark.parametrize("write", [write_llama, write_gemma3, write_mamba, write_falcon_h1])
async def test_a_real_engine_restores_what_another_has_computed(fleet: Fleet, tmp_path: Path, write: Writer) -> None:
    path, store = write(tmp_path / "tiny.gguf"), ("redis", fleet.redis())
    here, there = tier_over(fleet, store), tier_over(fleet, store)
    prompt = PROMPT[:150]
    one = Server(open_small(path, n_cells=1024, n_batch=64), here)
    first = await computed_and_sent(one, prompt)
    turn = [*prompt, *first, 11, 12, 13]
    expected, _ = await ask(one, turn)
    other = Server(open_small(path, n_cells=1024, n_batch=64), there)
    reply, usage = await ask(other, turn)
    assert usage.cached_tokens >= len(prompt) + len(first) - 1
    assert reply == expected
    one.close()
    other.close()


async def test_a_store_that_went_away_while_a_server_ended_does_not_keep_it(fleet: Fleet) -> None:
    store = ("redis", fleet.redis())
    tier = tier_over(fleet, store, lookup_seconds=0.25)
    server = Server(fake_engine(), tier)
    store[1].freeze()
    await ask(server, PROMPT)
    wait_for(lambda: states(tier) != ["closed"])
    await asyncio.to_thread(server.close)
