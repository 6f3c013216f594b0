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
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import Browser, expect

from pasture.api import ApiSettings, create_app
from pasture.api.server import DrainingServer, ServerOptions, bind
from pasture.fleet.routes import REPLICA_FIELDS, picture
from tests.browser.test_pages import CHROMIUM, At, browser, painted, watched
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
            app = create_app(made.service, ApiSettings(admin_key="root"))
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


def ask(server: At, user: int, question: str = "") -> None:
    body = {"prompt": f"{user} asks the users. " * 50 + question, "max_tokens": 8, "ignore_eos": True, "user": f"user {user}"}
    request = Request(server.url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    with urlopen(request, timeout=30) as answer:
        answer.read()


def test_an_ingress_shows_its_servers_and_where_requests_went(browser: Browser) -> None:
    with ingress() as server:
        for user in (1, 2, 3, 1):
            ask(server, user)
        with watched(browser, server, "/", key="root") as seen:
            page = seen.page
            servers = page.get_by_role("region", name="Servers")
            expect(page.get_by_role("heading", name="2 servers in the cluster")).to_be_visible()
            expect(servers.get_by_role("row")).to_have_count(3)
            expect(servers.get_by_role("rowheader")).to_have_text(["r0", "r1"])
            expect(page.locator(".moves")).to_contain_text(re.compile(r"[1-9] (by the ring|to where)"))
            expect(page.locator(".moves")).to_be_visible()
            seen.check()
            now = Request(server.url + "/v1/live/now", headers={"authorization": "Bearer root"})
            with urlopen(now, timeout=30) as answer:
                told = json.load(answer)["cluster"]
    assert [len(row) for row in told["replicas"]] == [len(REPLICA_FIELDS)] * 2
    assert sum(told["decisions"].values()) == 4
    assert "127.0.0.1" not in json.dumps(told)


def test_a_prefix_opens_at_the_ingress_and_tells_which_server_it_lives_on(browser: Browser) -> None:
    with ingress() as server:
        for user in range(8):  # by the ring, some here and some there
            for question in ("Who?", "Why?"):
                ask(server, user, question)
        with watched(browser, server, "/", key="root") as seen:
            page = seen.page
            trees = page.locator("section", has=page.get_by_role("heading", name="Prefixes"))
            expect(trees.get_by_role("heading", level=3)).to_have_text(["r0", "r1"])
            for name in ("r0", "r1"):
                page.get_by_role("list", name=name).locator("button.node.shared").first.press("Enter")
                facts = page.locator("#detail dd")
                expect(facts.nth(1)).to_contain_text(f"the live cache of {name}")
                expect(facts.nth(2)).to_have_text(re.compile(r"2 sequences: \d+, \d+"))
                expect(facts.nth(3)).to_have_text("1 request found it here")
                page.get_by_role("button", name="Show what it says").click()
                expect(page.locator("#detail pre")).to_contain_text(re.compile(r"\d asks the users\. \d asks"))
                expect(facts.nth(1)).to_contain_text(re.compile("copies of|no copy in a tier yet"))
            assert painted(page) > 100
            found = Axe().run(page).response["violations"]
            assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == []
            seen.check()
