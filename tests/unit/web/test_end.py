"""A page that is open does not hold up the server's end."""

from __future__ import annotations

import json

import httpx

from tests.unit.api.test_server import serving
from tests.unit.stub_service import StubService


async def test_an_open_dashboard_is_told_and_let_go() -> None:
    async with serving(StubService()) as (running, url, task), httpx.AsyncClient(base_url=url) as client:
        async with client.stream("GET", "/v1/live") as response:
            lines = response.aiter_lines()
            assert json.loads((await anext(lines)).removeprefix("data: "))["draining"] is False
            running.stop()
            rest = [json.loads(line.removeprefix("data: ")) async for line in lines if line]
        assert rest[-1]["draining"] is True
        await task
