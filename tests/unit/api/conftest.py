"""An HTTP client straight into the app, without sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import httpx
import pytest

from pasture.api import ApiSettings, create_app
from tests.unit.stub_service import StubService

Connect = Callable[..., httpx.AsyncClient]


@pytest.fixture
def service() -> StubService:
    return StubService()


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """`connect(service, settings)` -> a client of that app; errors of the app come back as its 500."""
    async with AsyncExitStack() as stack:

        def client(service: StubService, settings: ApiSettings | None = None) -> httpx.AsyncClient:
            transport = httpx.ASGITransport(create_app(service, settings), raise_app_exceptions=False)
            made = httpx.AsyncClient(transport=transport, base_url="http://pasture")
            stack.push_async_callback(made.aclose)
            return made

        yield client


@pytest.fixture
def client(connect: Connect, service: StubService) -> httpx.AsyncClient:
    return connect(service)
