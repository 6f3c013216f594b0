"""Makes the pictures of the documentation by the product itself: `make screenshots`.

Keeps what `pasture demo` prints. Then starts `pasture serve` on the small model, plays the `team` workload of the benchmarks
against it, half of it by each of two tenants, and photographs the dashboard and `pasture top` while that runs, then the chat
page with a shared document and a fork; pages at 1280 and 390 pixels, light and dark. Needs the `dev` extra and a Chromium
(PASTURE_CHROMIUM, or on the path).
Writes docs/img/*.png, each below MOST_BYTES, demo.svg and top.svg, and nothing else.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from playwright.async_api import Browser, Page, async_playwright, expect
from rich.console import Console

from pasture.bench.client import Endpoint, Exchange, run_loop
from pasture.bench.demo import Demo
from pasture.bench.drive import Target, play
from pasture.bench.options import Arrivals, BenchOptions
from pasture.bench.systems import PASTURE, Running, Size, default_model, running, variants
from pasture.bench.workloads import build
from pasture.cli.top import look
from pasture.cli.top_screen import Screen

FOLDER = Path(__file__).parents[1] / "docs" / "img"
MOST_BYTES = 240_000
WIDTHS = {1280: "", 390: "-narrow"}
ADMIN_KEY = "only-for-the-pictures"
TENANT_KEYS = ("help-desk", "workshop")
CELLS = 6144
OPTIONS = BenchOptions(users=14, turns=8, max_tokens=48, think_time=3.0, arrivals=Arrivals.STAGGERED)
WAIT_MS = 180_000
HEIGHTS = {("/", 1280): 1130, ("/", 390): 1700, ("/chat", 1280): 800, ("/chat", 390): 844}
DOCUMENT = (
    "The common pasture lies on a hill above the village. Forty sheep graze there from May to October. In winter the sheep "
    "stay in the barn and eat hay. The shepherd is called Anna. Her dog is called Rex. Every morning Anna and Rex bring the "
    "sheep to the pasture, and every evening they bring them home. There is a well in the middle of the pasture, and an old "
    "oak that gives shade in summer."
)
"""short and plain: the model is small"""

Shot = Callable[[Page, str], Awaitable[None]]


async def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    await demo()
    with tempfile.TemporaryDirectory(prefix="pasture-pictures-") as folder:
        rest = ("--kv-ram", "192MiB", "--kv-cache", f"{folder}/kv", "--idle-live", "2s", "--temp", "0")
        flags = (*rest, "--admin-key", ADMIN_KEY, "--api-key", ",".join(TENANT_KEYS))
        options = replace(OPTIONS, serve_flags=flags)
        system = variants(PASTURE, Size(0, 0, CELLS), options)[0]
        system = replace(system, endpoint=replace(system.endpoint, api_key=TENANT_KEYS[0]))
        async with running(system, Path(folder) / "pasture.log") as up, async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=_chromium(), args=["--no-sandbox"])
            team = asyncio.create_task(teams(options, up))
            await photograph(browser, up.system.endpoint, "/", "dashboard", dashboard)
            await photograph(browser, up.system.endpoint, "/", "prefixes", prefixes, widths=[1280])
            await top(replace(up.system.endpoint, api_key=ADMIN_KEY))
            if team.done() and (failed := next((e.error for e in team.result() if e.error is not None), None)):
                sys.exit(f"a request failed while the pictures were taken: {failed}")
            team.cancel()
            await asyncio.gather(team, return_exceptions=True)
            await photograph(browser, up.system.endpoint, "/chat", "chat", chat)
            await browser.close()
    _check_sizes()


async def demo() -> None:
    """What `make demo` prints, but for the server that it leaves."""
    console = Console(record=True, width=100)
    if await Demo(BenchOptions(wait=False), console).run():
        sys.exit("the demonstration failed")
    console.save_svg(str(FOLDER / "demo.svg"), title="make demo")


async def teams(options: BenchOptions, up: Running) -> list[Exchange]:
    """The workload, every other person of it by another tenant."""
    workload, exchanges = build(options), list[Exchange]()
    async with asyncio.TaskGroup() as group:
        for number, key in enumerate(TENANT_KEYS):
            part = replace(workload, actors=workload.actors[number :: len(TENANT_KEYS)])
            target = Target(replace(up.system.endpoint, api_key=key), up.model, 600.0)
            group.create_task(play(part, target, exchanges.append))
    return exchanges


async def top(endpoint: Endpoint) -> None:
    """`pasture top` after some seconds of looking."""
    screen = Screen(await look(endpoint), lambda: look(endpoint), endpoint.url, interval_seconds=1.0)
    async with screen.run_test(size=(110, 36)) as pilot:
        await pilot.pause(12.0)
        screen.save_screenshot("top.svg", str(FOLDER))


async def photograph(
    browser: Browser, endpoint: Endpoint, path: str, name: str, ready: Shot, widths: Iterable[int] = tuple(WIDTHS)
) -> None:
    """The page at every width, light and dark, each time after `ready` has brought it to where there is something to see."""
    for width in widths:
        async with opened(browser, endpoint.url + path, width, HEIGHTS[path, width]) as page:
            await ready(page, name)
            for scheme in ("light", "dark"):
                await page.emulate_media(color_scheme=scheme)
                await page.wait_for_timeout(1500)  # the picture fades into its new colours
                file = FOLDER / f"{name}{WIDTHS[width]}{'-dark' if scheme == 'dark' else ''}.png"
                await page.screenshot(path=file)
                print(f"{file.name}: {file.stat().st_size:,} bytes", flush=True)


@asynccontextmanager
async def opened(browser: Browser, url: str, width: int, height: int) -> AsyncGenerator[Page]:
    """A page of that width, with a tenant's key and the admin key in it."""
    context = await browser.new_context(viewport={"width": width, "height": height})
    page = await context.new_page()
    page.set_default_timeout(WAIT_MS)
    await page.goto(url)
    await page.get_by_role("button", name="Keys").click()
    await page.get_by_label("API key").fill(TENANT_KEYS[0])
    await page.get_by_label("Admin key").fill(ADMIN_KEY)
    await page.get_by_role("button", name="Use it").click()
    yield page
    await context.close()


async def dashboard(page: Page, name: str) -> None:
    await expect(page.locator(".factor")).to_be_visible(timeout=WAIT_MS)
    await expect(page.locator("button.node.shared").first).to_be_visible(timeout=WAIT_MS)
    await expect(page.locator(".form.raw").first).to_be_attached(timeout=WAIT_MS)  # somebody rests
    await page.wait_for_timeout(12_000)  # some history for the lines, some replies for the percentiles
    await page.locator("button.node.shared").first.click()
    await page.get_by_role("button", name="Show what it says").click()
    await expect(page.locator("#detail pre")).to_be_visible()
    await page.evaluate("scrollTo(0, 0)")


async def prefixes(page: Page, name: str) -> None:
    """The lower half of the dashboard: who shares what, what it says, what happens, and the tenants."""
    await dashboard(page, name)
    await page.locator("#tree-title").evaluate("title => title.scrollIntoView()")


async def chat(page: Page, name: str) -> None:
    await page.get_by_label("Longest reply").fill("40")
    await page.get_by_text("Shared document").click()
    await page.get_by_label("Text that the chats begin with").fill(DOCUMENT)
    await page.get_by_text("Shared document").click()
    await _say(page, "Chat 1", "What is the name of the shepherd?")
    await _say(page, "Chat 2", "Where do the sheep stay in winter?")
    await page.get_by_role("region", name="Chat 1", exact=True).get_by_role("button", name="Fork here").click()
    await _say(page, "Chat 3", "What is the name of the dog?", replies=2)
    await page.get_by_role("region", name="Chat 3", exact=True).evaluate("chat => chat.scrollIntoView({inline: 'start'})")
    await page.evaluate("scrollTo(0, 0)")


async def _say(page: Page, name: str, text: str, replies: int = 1) -> None:
    region = page.get_by_role("region", name=name, exact=True)
    await region.get_by_label(f"Message to {name}").fill(text)
    await region.get_by_label(f"Message to {name}").press("Enter")
    await expect(region.locator(".badge")).to_have_count(replies, timeout=WAIT_MS)


def _chromium() -> str:
    found = os.environ.get("PASTURE_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        sys.exit("no Chromium on this machine: install it, or set PASTURE_CHROMIUM")
    return found


def _check_sizes() -> None:
    for file in FOLDER.glob("*.png"):
        if file.stat().st_size > MOST_BYTES:
            sys.exit(f"{file.name} has {file.stat().st_size:,} bytes; {MOST_BYTES:,} are the most")


if __name__ == "__main__":
    default_model()  # says what is missing before anything is started
    run_loop(main())
