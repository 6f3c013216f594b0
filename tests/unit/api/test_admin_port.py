"""The admin port: what tells of everybody's doing is there, behind its key, and nowhere else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from pasture.api import ApiSettings, create_app
from pasture.api.server import DrainingServer, ServerOptions, bind
from tests.unit.api.wire import CHAT, chat_body
from tests.unit.stub_service import StubService


@asynccontextmanager
async def both_ports() -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient]]:
    """Clients of the main port and of the admin port."""
    main, admin = bind("127.0.0.1", 0), bind("127.0.0.1", 0)
    urls = [f"http://127.0.0.1:{listener.getsockname()[1]}" for listener in (main, admin)]
    settings = ApiSettings(api_keys=("k",), admin_key="a", admin_port=admin.getsockname()[1])
    started: asyncio.Queue[str] = asyncio.Queue()
    running = DrainingServer(create_app(StubService(), settings), ServerOptions(), started.put_nowait)
    task = asyncio.create_task(running.serve([main, admin]))
    assert await started.get() == urls[0]
    async with httpx.AsyncClient(base_url=urls[0]) as one, httpx.AsyncClient(base_url=urls[1]) as other:
        yield one, other
        running.stop()
    await task


ADMINS = ["/metrics", "/slots", "/v1/diagnosis", "/v1/admin/tenants", "/v1/live/now"]
ADMIN, TENANT = {"authorization": "Bearer a"}, {"authorization": "Bearer k"}


async def test_what_is_the_operators_is_on_the_admin_port_alone() -> None:
    async with both_ports() as (main, admin):
        for path in ADMINS:
            assert (await main.get(path, headers=ADMIN)).status_code == 404
            assert (await admin.get(path, headers=ADMIN)).status_code == 200
            assert (await admin.get(path, headers=TENANT)).status_code == 401
            assert (await admin.get(path)).status_code == 401


async def test_nothing_is_generated_on_the_admin_port() -> None:
    async with both_ports() as (main, admin):
        assert (await main.post(CHAT, json=chat_body(), headers=TENANT)).status_code == 200
        for headers in (TENANT, ADMIN):
            assert (await admin.post(CHAT, json=chat_body(), headers=headers)).status_code == 404


@pytest.mark.parametrize("path", ["/health", "/health/live", "/"])
async def test_what_is_open_is_on_both(path: str) -> None:
    async with both_ports() as (main, admin):
        for client in (main, admin):
            assert (await client.get(path)).status_code == 200


async def test_a_header_does_not_change_the_port_that_one_came_in_by() -> None:
    async with both_ports() as (main, admin):
        forged = {"host": str(admin.base_url.netloc, "ascii"), "x-forwarded-port": str(admin.base_url.port), **ADMIN}
        assert (await main.get("/metrics", headers=forged)).status_code == 404
