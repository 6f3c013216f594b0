"""An app over the fake engine with tenants and keys, and clients of it without sockets."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

import httpx
import openai

from pasture.api import ApiSettings, create_app
from pasture.core.values import Namespace, PoolShape, Request, SamplingParams, TokenEvent
from pasture.engine.fake import FakeEngine, expected_reply
from pasture.scheduler.service import LocalService
from pasture.scheduler.settings import SchedulerSettings
from pasture.sessions.state import State
from pasture.sessions.values import Share
from tests.store_support import store_for

GREEDY = ApiSettings(sampling=SamplingParams(temperature=0.0), admin_key="admin")


class WatchedService(LocalService):
    """Notes for every tenant what its own requests could have left in the cache, and catches hits on anything else."""

    def __init__(self, engine: FakeEngine) -> None:
        super().__init__(engine, store_for(engine), SchedulerSettings(check_invariants=True, max_running=32))
        self.seen: dict[str, list[list[int]]] = {}
        self.expected: dict[Namespace, list[Sequence[int]]] = {}
        self.namespaces: set[Namespace] = set()
        self.foreign_hits: list[tuple[Request, int, int]] = []
        self.hit_tokens = 0
        self.most_public_tokens = 0

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        self.namespaces.add(request.namespace)
        self.most_public_tokens = max(self.most_public_tokens, request.public_tokens)
        own = self.seen.setdefault(request.tenant, [])
        mine = list(request.prompt)
        own.append(mine)
        async with aclosing(super().generate(request)) as events:
            async for event in events:
                if event.token is not None:
                    mine.append(event.token)
                if event.finish is not None:
                    left = [*(line for line in own if line is not mine), *self.expected.get(request.namespace, ())]
                    possible = max((_common(line, request.prompt) for line in left), default=0)
                    possible = max(possible, request.public_tokens)
                    found = event.finish.usage.cached_tokens
                    self.hit_tokens += found
                    if found > possible:
                        self.foreign_hits.append((request, found, possible))
                yield event

    def anticipate(self, namespace: Namespace, tokens: Sequence[int], *, typing: bool = False) -> None:
        """What is computed ahead of a tenant's next turn is in the cache too, though no request of it said so yet."""
        self.expected.setdefault(namespace, []).append(tokens)
        super().anticipate(namespace, tokens, typing=typing)


def _common(one: Sequence[int], two: Sequence[int]) -> int:
    n = 0
    for a, b in zip(one, two, strict=False):
        if a != b:
            break
        n += 1
    return n


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
    tenants: Sequence[str], *, share: Share = Share.TENANT, shape: PoolShape | None = None, settings: ApiSettings = GREEDY
) -> AsyncIterator[World]:
    """A server for these tenants; its books are checked after every step."""
    service = WatchedService(FakeEngine(shape or PoolShape(8192, 64)))
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
    vocabulary = FakeEngine(PoolShape(64, 2)).vocabulary
    prompt = vocabulary.tokenize(rendered(messages), add_special=False, parse_special=True)
    tokens = expected_reply(prompt, n_tokens, SamplingParams(temperature=0.0), vocabulary.end_tokens)
    return b"".join(vocabulary.piece(token) for token in tokens).decode(errors="replace")
