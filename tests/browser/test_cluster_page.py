"""The dashboard of an ingress: its servers, what is in flight there, and why requests went where they went."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.request import Request, urlopen

import pytest
from playwright.sync_api import Browser, expect

from pasture.api import create_app
from pasture.api.server import DrainingServer, ServerOptions, bind
from pasture.fleet.routes import REPLICA_FIELDS, picture
from tests.browser.test_pages import CHROMIUM, At, browser, watched
from tests.cluster_support import fleet

__all__ = ["browser"]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: install it, or set PASTURE_CHROMIUM")


@contextmanager
def ingress() -> Iterator[At]:
    """An ingress over two replicas, all of them on one loop in a thread."""
    told: list[str] = []
    listening = threading.Event()
    stop: list[DrainingServer] = []

    def started(url: str) -> None:
        told.append(url)
        listening.set()

    async def serve() -> None:
        async with fleet() as made:
            app = create_app(made.service)
            app.state.gateway.live.add("cluster", lambda: picture(made.service))
            server = DrainingServer(app, ServerOptions(), started)
            stop.append(server)
            await server.serve(sockets=[bind("127.0.0.1", 0)])

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert listening.wait(30)
        yield At(told[0])
    finally:
        loop.call_soon_threadsafe(stop[0].stop)
        thread.join(30)
        loop.close()


def ask(server: At, user: int) -> None:
    body = {"prompt": f"User {user} asks. " * 80, "max_tokens": 8, "ignore_eos": True, "user": f"user {user}"}
    request = Request(server.url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    with urlopen(request, timeout=30) as answer:
        answer.read()


def test_an_ingress_shows_its_servers_and_where_requests_went(browser: Browser) -> None:
    with ingress() as server:
        for user in (1, 2, 3, 1):
            ask(server, user)
        with watched(browser, server, "/") as seen:
            page = seen.page
            servers = page.get_by_role("region", name="Servers")
            expect(page.get_by_role("heading", name="2 servers in the cluster")).to_be_visible()
            expect(servers.get_by_role("row")).to_have_count(3)
            expect(servers.get_by_role("rowheader")).to_have_text(["r0", "r1"])
            expect(page.locator(".moves")).to_contain_text(re.compile(r"[1-9] (by the ring|to where)"))
            expect(page.locator(".moves")).to_be_visible()
            seen.check()
            with urlopen(server.url + "/v1/live/now", timeout=30) as answer:
                told = json.load(answer)["cluster"]
    assert [len(row) for row in told["replicas"]] == [len(REPLICA_FIELDS)] * 2
    assert sum(told["decisions"].values()) == 4
    assert "127.0.0.1" not in json.dumps(told)
