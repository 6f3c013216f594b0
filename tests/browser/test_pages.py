"""The pages in Chromium, against `pasture serve` with the engine without a model: they move, say nothing to the console, ask
nobody else, and axe finds nothing serious.

Needs a Chromium of the system's (PASTURE_CHROMIUM, or `chromium` on the path) and is skipped, with the reason, without one.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlsplit

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import Browser, Page, Request, Route, expect, sync_playwright

from pasture.api.server import bind
from pasture.bench.client import Endpoint
from pasture.bench.drive import Target, play
from pasture.bench.options import BenchOptions
from pasture.bench.workloads import build
from tests.e2e.test_serve_command import Server

CHROMIUM = os.environ.get("PASTURE_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: install it, or set PASTURE_CHROMIUM")

SYSTEM = "You look after the sheep on a common pasture, and answer everybody. " * 20
USERS = 6
_WAIT_MS = 20_000
expect.set_options(timeout=_WAIT_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path, "-c", "8192", "--admin-key", "root")
    yield made
    made.close()


@dataclass(frozen=True)
class At:
    """A server that somebody else has started."""

    url: str


class Watched:
    """A page, and what it should not do: complain, or ask another host."""

    def __init__(self, page: Page, server: Server | At) -> None:
        self.page = page
        self._host = urlsplit(server.url).netloc
        self.complaints: list[str] = []
        self.foreign: list[str] = []
        page.set_default_timeout(_WAIT_MS)
        page.on(
            "console", lambda message: self.complaints.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self._saw(request.url))

    def _saw(self, url: str) -> None:
        if urlsplit(url).netloc != self._host:
            self.foreign.append(url)

    def check(self, *refusals: int) -> None:
        """`refusals`: HTTP statuses that are the point of the test. The browser itself reports each to the console, and every
        401 as well; asking without a key is how a page finds out that one is needed."""
        expected = [str(status) for status in (401, *refusals)]
        assert [text for text in self.complaints if not any(status in text for status in expected)] == []
        assert self.foreign == []


@contextmanager
def watched(
    browser: Browser, server: Server | At, path: str, *, width: int = 1280, dark: bool = False, key: str = ""
) -> Iterator[Watched]:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light")
    seen = Watched(context.new_page(), server)
    seen.page.goto(server.url + path)
    if key:
        seen.page.get_by_role("button", name=re.compile("^Key")).click()
        seen.page.get_by_label("Admin key" if key == "root" else "API key").fill(key)
        seen.page.get_by_role("button", name="Use it").click()
    yield seen
    context.close()


@contextmanager
def crowd(server: Server) -> Iterator[None]:
    """People who chat until the block ends."""
    ended = threading.Event()

    def chat(user: int) -> None:
        turn = 0
        while not ended.is_set():
            turn += 1
            question = f"Question {turn} of user {user}"
            messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
            try:
                server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 32, "ignore_eos": True})
            except URLError:
                return
            ended.wait(0.05)

    threads = [threading.Thread(target=chat, args=(user,)) for user in range(USERS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


@contextmanager
def team(server: Server) -> Iterator[None]:
    """The workload of `pasture bench team`, one run after the other until the block ends."""
    ended = threading.Event()
    workload = build(BenchOptions(users=USERS, turns=3, max_tokens=64, think_time=0.2))

    def run() -> None:
        while not ended.is_set():
            exchanges = asyncio.run(play(workload, Target(Endpoint.parse(server.url, None), "default", 30.0)))
            errors.extend(exchange.error for exchange in exchanges if exchange.error is not None)

    errors: list[str] = []
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    assert errors == []


def painted(page: Page) -> int:
    """Squares' pixels of the pool's picture that are neither empty nor free cells."""
    found: int = page.locator("canvas").evaluate(
        "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter((v, i) => i % 4 === 3 && v > 60).length"
    )
    return found


def test_the_dashboard_moves_while_people_chat(browser: Browser, server: Server) -> None:
    with crowd(server), watched(browser, server, "/", key="root") as seen:
        page = seen.page
        expect(page.locator(".state")).to_have_text("live")
        expect(page.locator("#reused")).not_to_have_text("0")
        before = page.locator("#reused").inner_text()
        expect(page.locator("#reused")).not_to_have_text(before)
        expect(page.get_by_text(re.compile(r"of 8,192 cells"))).to_be_visible()
        expect(page.locator(".tile").first).to_have_text(re.compile(r"Users now\s*1\s*[1-6] requests?: "))
        assert painted(page) > 100
        seen.check()


def test_the_dashboard_draws_a_live_team_run(browser: Browser, tmp_path: Path) -> None:
    """The benchmarks' own `team`, over and over until the page has shown it."""
    server = Server(tmp_path, "-c", "32768", "--admin-key", "root")
    try:
        with team(server), watched(browser, server, "/", key="root") as seen:
            page = seen.page
            expect(page.locator(".factor strong")).to_have_text(re.compile(r"^([2-9]|[1-9]\d)\.\d×$"))
            shared = page.locator("button.node.shared").first
            expect(shared).to_have_text(re.compile(r"[1-9],\d\d\d tokens\s*[1-9]\d* share it"))
            assert painted(page) > 100
            shared.click()
            hits = page.locator("#detail dd").nth(3)
            expect(hits).to_have_text(re.compile(r"[1-9]\d* requests found it here"))
            page.get_by_role("button", name="Show what it says").click()
            expect(page.locator("#detail pre")).to_contain_text("You are the help desk for the Python language")
            expect(page.locator("#detail dd").nth(1)).to_contain_text(
                re.compile(r"copies of [\d,]+ tokens in RAM|no copy in a tier yet")
            )
            seen.check()
    finally:
        server.close()


def test_a_prefix_opens_and_says_what_it_says_to_the_admin_key(browser: Browser, server: Server) -> None:
    with crowd(server), watched(browser, server, "/", key="root") as seen:
        page = seen.page
        page.locator("button.node.shared").first.press("Enter")
        expect(page.locator("#detail dd").nth(2)).to_have_text(re.compile(r"\d+ sequences: \d"))
        page.get_by_role("button", name="Show what it says").click()
        expect(page.locator("#detail pre")).to_contain_text("sheep on a common pasture")
        seen.check()


def test_the_admin_key_sees_every_kept_conversation_and_where_it_is(browser: Browser, server: Server) -> None:
    for number in range(30):
        body = {
            "messages": [{"role": "user", "content": f"{SYSTEM} {number}"}],
            "max_tokens": 2,
            "prompt_cache_key": f"talk {number}",
        }
        assert httpx.post(server.url + "/v1/chat/completions", json=body, timeout=30).status_code == 200
    with watched(browser, server, "/", key="root") as seen:
        page = seen.page
        page.get_by_text("Conversations that the server keeps").click()
        kept = page.locator(".kept")
        expect(kept.locator(".facts")).to_contain_text("1 to 25 of 30")
        expect(kept.locator("tbody tr").first).to_contain_text(re.compile(r"talk 29\s*(live|RAM) \d+ %"))
        kept.get_by_role("button", name="earlier").click()
        expect(kept.locator(".facts")).to_contain_text("26 to 30 of 30")
        expect(kept.locator("tbody tr")).to_have_count(5)
        seen.check()


def test_without_the_key_there_is_a_place_to_enter_it(browser: Browser, server: Server) -> None:
    with watched(browser, server, "/") as seen:
        expect(seen.page.locator(".state")).to_have_text("a key is needed")
        expect(seen.page.locator(".headline")).to_have_count(0)
        seen.check()
        seen.page.get_by_role("button", name="Enter the key").click()
        seen.page.get_by_label("Admin key").fill("root")
        seen.page.keyboard.press("Enter")
        expect(seen.page.locator(".headline")).to_be_visible()
        seen.check()


def test_a_fork_copies_nothing_and_its_reply_reuses_what_both_have(browser: Browser, server: Server) -> None:
    with watched(browser, server, "/chat", key="root") as seen:
        page = seen.page
        page.get_by_label("Longest reply").fill("24")
        page.get_by_text("Shared document").click()
        page.get_by_label("Text that the chats begin with").fill("<img src=x onerror=alert(1)> All about sheep. " * 20)
        one, two = page.get_by_role("region", name="Chat 1", exact=True), page.get_by_role("region", name="Chat 2", exact=True)
        one.get_by_label("Message to Chat 1").fill("How many?")
        one.get_by_role("button", name="Send").click()
        expect(one.locator(".badge")).to_be_visible()
        two.get_by_label("Message to Chat 2").fill("Which breeds?")
        two.get_by_label("Message to Chat 2").press("Enter")
        expect(two.locator(".badge")).to_have_text(
            re.compile(r"reused 9\d\d of [\d,]+ tokens, live in the cache · first token")
        )
        one.get_by_role("button", name="Fork here").click()
        three = page.get_by_role("region", name="Chat 3", exact=True)
        expect(three.locator(".fork-note")).to_contain_text("nothing is copied")
        three.get_by_label("Message to Chat 3").fill("And <b>goats</b>?")
        three.get_by_label("Message to Chat 3").press("Enter")
        expect(three.locator(".badge").nth(1)).to_have_text(re.compile(r"reused (1,0|9)\d\d of (1,0|9)\d\d"))
        expect(three.locator(".fork-note")).to_have_text(
            re.compile(r"its first reply reused (1,0|9)\d\d tokens and computed \d\d$")
        )
        expect(three.get_by_text("And <b>goats</b>?")).to_be_visible()
        expect(three.get_by_label("Message to Chat 3")).to_have_value("")
        seen.check()


@pytest.mark.parametrize("stopped", [True, False], ids=["stopped", "refused"])
def test_a_question_without_a_reply_goes_back_to_where_it_was_typed(browser: Browser, server: Server, stopped: bool) -> None:
    def refuse(route: Route) -> None:
        if not stopped:
            route.fulfill(status=503, json={"error": {"message": "the line is full"}})

    with watched(browser, server, "/chat", key="root") as seen:
        page = seen.page
        page.get_by_label("Longest reply").fill("8")
        chat = page.get_by_role("region", name="Chat 1", exact=True)
        field = chat.get_by_label("Message to Chat 1")
        page.route("**/v1/chat/completions", refuse)
        field.fill("How many sheep?")
        field.press("Enter")
        if stopped:
            chat.get_by_role("button", name="Stop").click()
        expect(chat.get_by_text("stopped" if stopped else "the line is full")).to_be_visible()
        expect(field).to_have_value("How many sheep?")
        expect(chat.locator(".message")).to_have_count(0)
        page.unroute("**/v1/chat/completions")
        with page.expect_request("**/v1/chat/completions") as asked:
            field.press("Enter")
        expect(chat.locator(".badge")).to_be_visible()
        body = asked.value.post_data_json
        assert body is not None
        assert body["messages"] == [{"role": "user", "content": "How many sheep?"}]
        expect(chat.get_by_text("stopped" if stopped else "the line is full")).to_have_count(0)
        seen.check(503)


def test_with_an_admin_port_the_pages_say_what_is_where(browser: Browser, tmp_path: Path) -> None:
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    server = Server(tmp_path, "-c", "8192", "--admin-key", "root", "--admin-port", str(port))
    admin = At(f"http://127.0.0.1:{port}")
    try:
        with watched(browser, server, "/") as seen:
            expect(seen.page.locator(".notice")).to_contain_text("admin port (--admin-port): open this page there")
            seen.check(404)
        with watched(browser, server, "/chat") as seen:
            chat = seen.page.get_by_role("region", name="Chat 1", exact=True)
            expect(seen.page.locator(".state")).to_have_text("ready; live numbers are on the admin port")
            seen.page.get_by_label("Longest reply").fill("8")
            chat.get_by_label("Message to Chat 1").fill("Hi")
            chat.get_by_label("Message to Chat 1").press("Enter")
            expect(chat.locator(".badge")).to_be_visible()
            seen.check(404)
        with watched(browser, admin, "/", key="root") as seen:
            expect(seen.page.get_by_text(re.compile(r"of 8,192 cells"))).to_be_visible()
            seen.check()
        with watched(browser, admin, "/chat", key="root") as seen:
            chat = seen.page.get_by_role("region", name="Chat 1", exact=True)
            chat.get_by_label("Message to Chat 1").fill("Hi")
            chat.get_by_label("Message to Chat 1").press("Enter")
            expect(chat.get_by_text("chat on the server's main port")).to_be_visible()
            expect(chat.get_by_label("Message to Chat 1")).to_have_value("Hi")
    finally:
        server.close()


def test_typing_tells_the_server_with_every_word_what_will_be_asked(browser: Browser, server: Server) -> None:
    with watched(browser, server, "/chat", key="root") as seen:
        hints: list[Request] = []
        seen.page.on("request", lambda request: hints.append(request) if request.url.endswith("/v1/chat/prefetch") else None)
        field = seen.page.get_by_label("Message to Chat 1")
        field.press_sequentially("How many sheep?", delay=120)
        expect(field).to_have_value("How many sheep?")
        drafts = ["H", "How ", "How many ", "How many sheep?"]
        assert [hint.post_data_json for hint in hints] == [{"messages": [], "draft": draft} for draft in drafts]
        answer = hints[-1].response()
        assert answer is not None
        assert answer.status == 202


def test_a_users_key_opens_the_chat_and_not_the_numbers(browser: Browser, tmp_path: Path) -> None:
    server = Server(tmp_path, "-c", "8192", "--admin-key", "root", "--api-key", "theirs")
    try:
        with watched(browser, server, "/chat", key="theirs") as seen:
            chat = seen.page.get_by_role("region", name="Chat 1", exact=True)
            expect(seen.page.locator(".state")).to_have_text("ready; live numbers need the admin key")
            seen.page.get_by_label("Longest reply").fill("8")
            chat.get_by_label("Message to Chat 1").fill("Hi")
            chat.get_by_label("Message to Chat 1").press("Enter")
            expect(chat.locator(".badge")).to_be_visible()
            chat.get_by_role("button", name="Fork here").click()
            expect(seen.page.locator(".fork-note")).to_contain_text("nothing is copied")
            seen.check()
    finally:
        server.close()


@pytest.mark.parametrize(
    ("path", "width", "dark"), [("/", 1280, False), ("/", 390, True), ("/chat", 1280, True), ("/chat", 390, False)]
)
def test_axe_finds_nothing_serious(browser: Browser, server: Server, path: str, width: int, dark: bool) -> None:
    with crowd(server), watched(browser, server, path, width=width, dark=dark, key="root") as seen:
        expect(seen.page.locator(".state")).to_have_text("live")
        if path == "/":
            seen.page.locator("button.node.shared").first.click()
            expect(seen.page.locator("#detail dl")).to_be_visible()
        found = Axe().run(seen.page).response["violations"]
        assert [f"{v['id']}: {v['nodes'][0]['html']}" for v in found if v["impact"] in ("serious", "critical")] == []
        too_wide = seen.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert too_wide <= 0, "the page scrolls sideways"
        seen.check()
