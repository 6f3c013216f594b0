"""An app over the fake engine with tenants and keys, and clients of it without sockets."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import httpx
import openai
from sqlalchemy.exc import OperationalError

from pasture.api import ApiSettings, create_app
from pasture.core.ports import Engine, OnEnd
from pasture.core.storage import Store
from pasture.core.values import Namespace, PoolShape, Request, SamplingParams, TokenEvent
from pasture.engine.fake import FakeEngine, expected_reply
from pasture.scheduler.service import LocalService
from pasture.scheduler.settings import SchedulerSettings
from pasture.sessions.state import State
from pasture.sessions.values import Share
from pasture.tiers.disk import DiskTier
from tests.store_support import store_for

GREEDY = ApiSettings(sampling=SamplingParams(temperature=0.0), admin_key="admin")


def full() -> None:
    """In place of a database's `write`: what one on a full disk does, and what it must not say about whom."""
    raise OperationalError("INSERT INTO turns", {"messages": "secret"}, Exception("database or disk is full"))


def assert_says_full(log: str) -> None:
    """Somebody wrote down that the database is full, and nothing of what people had said."""
    assert "database or disk is full" in log
    assert "secret" not in log


class WatchedService(LocalService):
    """Notes for every tenant what its own requests could have left in the cache, and catches hits on anything else."""

    def __init__(self, engine: Engine, store: Store, settings: SchedulerSettings) -> None:
        super().__init__(engine, store, settings)
        self._begun: Counter[tuple[str, tuple[int, ...]]] = Counter()
        """how often a tenant has sent a prompt"""
        self._running: dict[str, list[array[int]]] = {}
        self._left: dict[str, set[bytes]] = {}
        """what a tenant's requests have left, prompt and reply"""
        self._expected: dict[Namespace, set[bytes]] = {}
        self.namespaces: set[Namespace] = set()
        self.foreign_hits: list[tuple[Request, int]] = []
        self.hit_tokens = 0
        self.most_public_tokens = 0

    async def generate(self, request: Request, on_end: OnEnd | None = None) -> AsyncGenerator[TokenEvent, None]:
        self.namespaces.add(request.namespace)
        self.most_public_tokens = max(self.most_public_tokens, request.public_tokens)
        running = self._running.setdefault(request.tenant, [])
        mine = array("i", request.prompt)
        running.append(mine)
        self._begun[request.tenant, request.prompt] += 1
        try:
            async with aclosing(super().generate(request, on_end)) as events:
                async for event in events:
                    if event.token is not None:
                        mine.append(event.token)
                    if event.finish is not None:
                        self._compare(request, mine, event.finish.usage.cached_tokens)
                    yield event
        finally:
            running[:] = [line for line in running if line is not mine]
            self._left.setdefault(request.tenant, set()).add(mine.tobytes())

    def anticipate(self, namespace: Namespace, tokens: Sequence[int], *, typing: bool = False) -> None:
        """What is computed ahead of a tenant's next turn is in the cache too, though no request of it said so yet."""
        self._expected.setdefault(namespace, set()).add(array("i", tokens).tobytes())
        super().anticipate(namespace, tokens, typing=typing)

    async def restore(self, namespace: Namespace, tokens: Sequence[int], exported: bytes) -> int:
        """What a tenant has imported is its own as well."""
        self._expected.setdefault(namespace, set()).add(array("i", tokens).tobytes())
        return await super().restore(namespace, tokens, exported)

    def _compare(self, request: Request, mine: array[int], found: int) -> None:
        """What was found with what the tenant's own requests can have left."""
        self.hit_tokens += found
        if found <= request.public_tokens or self._begun[request.tenant, request.prompt] > 1:
            return
        beginning = array("i", request.prompt[:found]).tobytes()
        running = (line.tobytes() for line in self._running[request.tenant] if line is not mine)
        own = chain(self._left.get(request.tenant, ()), self._expected.get(request.namespace, ()), running)
        if not any(line.startswith(beginning) for line in own):
            self.foreign_hits.append((request, found))


@dataclass
class World:
    """One server, its tenants' keys, and who can ask it."""

    service: WatchedService
    state: State
    transport: httpx.ASGITransport
    keys: dict[str, str]

    def http(self, tenant: str) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {self.keys[tenant]}"}
        return httpx.AsyncClient(transport=self.transport, base_url="http://pasture/v1", headers=headers)

    def openai(self, tenant: str) -> openai.AsyncOpenAI:
        client = httpx.AsyncClient(transport=self.transport, base_url="http://pasture/v1")
        return openai.AsyncOpenAI(base_url="http://pasture/v1", api_key=self.keys[tenant], http_client=client, max_retries=0)


@asynccontextmanager
async def world(
    tenants: Sequence[str],
    *,
    share: Share = Share.TENANT,
    shape: PoolShape | None = None,
    settings: ApiSettings = GREEDY,
    ram_bytes: int = 1 << 30,
    disk: Path | None = None,
    check_every_step: bool = True,
) -> AsyncIterator[World]:
    """A server for these tenants; its books are checked after every step, or only when it is idle."""
    engine = FakeEngine(shape or PoolShape(8192, 64))
    store = store_for(engine, ram_bytes, () if disk is None else (DiskTier(disk, 1 << 30),))
    service = WatchedService(engine, store, SchedulerSettings(check_invariants=check_every_step, max_running=32))
    state = State(share=share)
    keys = {name: state.tenants.add_key(name)[0] for name in tenants}
    try:
        app = create_app(service, settings, state=state)
        yield World(service, state, httpx.ASGITransport(app, raise_app_exceptions=False), keys)
    finally:
        service.close()
        state.close()


def rendered(messages: Sequence[dict[str, str]]) -> str:
    """A conversation as the fake model's template shows it."""
    return "".join(f"<|{message['role']}|>{message['content']}\n" for message in messages) + "<|assistant|>"


def answer_to(messages: Sequence[dict[str, str]], n_tokens: int) -> str:
    """What the fake model says when it attends to exactly these messages."""
    return _answer_to(rendered(messages), n_tokens)


@lru_cache(maxsize=100_000)
def _answer_to(text: str, n_tokens: int) -> str:
    vocabulary = FakeEngine(PoolShape(64, 2)).vocabulary
    prompt = vocabulary.tokenize(text, add_special=False, parse_special=True)
    tokens = expected_reply(prompt, n_tokens, SamplingParams(temperature=0.0), vocabulary.end_tokens)
    return b"".join(vocabulary.piece(token) for token in tokens).decode(errors="replace")
