"""What an open dashboard costs, at 1,000 sessions: `python tools/page_cost.py`.

Starts `pasture serve` on the engine without a model, lets 1,000 sessions say something (256 stay in the live cache, it has no
more sequences; the others rest in RAM), and opens the dashboard on it while a few go on talking. Two figures, both of processor
time and not of the clock, so that a busy machine does not change them:

    page    script on Chromium's main thread from one frame to the next: the worst frame and the 99th percentile, in ms (limit
            16). Everything there counts that is not Chromium's own drawing (styles, layout, paint)
    server  the server's processor time with a page open less that without one, as a share of one core: the median of three
            pairs (limit 1 %)

Needs the `dev` extra and a Chromium (PASTURE_CHROMIUM, or on the path).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any
from urllib.request import Request, urlopen

import psutil
from playwright.sync_api import Browser, Page, expect, sync_playwright

SESSIONS = 1000
LIVE = 254
TALKERS = 4
FRAME_MS = 16.0
SERVER_SHARE = 0.01
SECONDS = 10.0
PAIRS = 3
_WAIT_MS = 60_000
_DRAWING = {"Layout", "UpdateLayoutTree", "PrePaint", "Paint", "Layerize"}
_SETTLED_SHARE = 0.03
_SYSTEM = "You look after the sheep on a common pasture, and answer everybody. " * 4


@dataclass(frozen=True, slots=True)
class Cost:
    """What was measured; times are of the processor."""

    sessions: int
    live_sequences: int
    frames: int
    worst_frame_ms: float
    p99_frame_ms: float
    server_share: float
    """of one core, for one page that is open"""
    snapshot_bytes: int
    """of one look, twice a second"""

    @property
    def within(self) -> bool:
        """Whether both limits are kept."""
        return self.worst_frame_ms < FRAME_MS and self.server_share < SERVER_SHARE


def measure(sessions: int = SESSIONS, seconds: float = SECONDS, pairs: int = PAIRS) -> Cost:
    """Starts everything and ends it. `seconds` is for each part: page, and of a pair the server without a page and with one."""
    with served() as (url, process), sync_playwright() as playwright:
        talk(url, range(sessions), workers=16)
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        settle(process)
        shares = [_page_share(browser, url, process, seconds) for _ in range(pairs)]
        page = browser.new_page()
        live = opened(page, url)
        with urlopen(url + "/v1/live/now", timeout=60) as answer:
            snapshot_bytes = len(answer.read())
        frames = frames_of(traced(browser, page, url, sessions, seconds))
        browser.close()
    ordered = sorted(frames)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return Cost(sessions, live, len(frames), ordered[-1], p99, max(0.0, median(shares)), snapshot_bytes)


def _page_share(browser: Browser, url: str, process: psutil.Process, seconds: float) -> float:
    """What one page costs the server, of one core."""
    alone = processor_share(process, seconds)
    page = browser.new_page()
    opened(page, url)
    watched = processor_share(process, seconds)
    page.close()
    return watched - alone


@contextmanager
def served() -> Iterator[tuple[str, psutil.Process]]:
    """A server without a model whose live cache keeps what it has."""
    flags = ["-c", "262144", "-np", str(LIVE), "--kv-ram", "1GiB", "--idle-live", "1h", "--kv-layout", "unified"]
    command = [sys.executable, "-m", "pasture", "serve", "--fake-engine", "--port", "0", *flags]
    with tempfile.TemporaryDirectory(prefix="pasture-cost-") as folder:
        process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if found := re.search(r"serves at (http\S+)/v1", line):
                    yield found[1], psutil.Process(process.pid)
                    return
            raise RuntimeError("the server did not start")
        finally:
            process.kill()
            process.communicate()


def talk(url: str, numbers: Sequence[int], workers: int) -> None:
    """One question of each of these sessions."""
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda number: _ask(url, number), numbers))


def _ask(url: str, number: int) -> None:
    messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": f"Session {number}: how many sheep?"}]
    body = {"messages": messages, "max_tokens": 16, "ignore_eos": True, "prompt_cache_key": f"session {number}"}
    request = Request(url + "/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    with urlopen(request, timeout=60) as answer:
        answer.read()


def settle(process: psutil.Process) -> None:
    """Wait until the server has put away what was said, for at most half a minute."""
    for _ in range(30):
        if processor_share(process, 1.0) < _SETTLED_SHARE:
            return


def processor_share(process: psutil.Process, seconds: float) -> float:
    """Processor seconds a second that the server takes while nobody asks for anything."""
    before, started = process.cpu_times(), time.monotonic()
    time.sleep(seconds)
    after = process.cpu_times()
    return (after.user + after.system - before.user - before.system) / (time.monotonic() - started)


def opened(page: Page, url: str) -> int:
    """The dashboard, live; the number of sequences that it shows."""
    page.goto(url + "/")
    expect(page.locator(".state")).to_have_text("live", timeout=_WAIT_MS)
    summary = page.locator("details.sequences summary")
    summary.click()
    return int(summary.inner_text().split()[0])


def traced(browser: Browser, page: Page, url: str, sessions: int, seconds: float) -> list[dict[str, Any]]:
    """Chromium's own trace of the page while a few sessions go on talking."""
    ended = threading.Event()

    def go_on(talker: int) -> None:
        number = talker
        while not ended.is_set():
            _ask(url, number % sessions)
            number += TALKERS
            ended.wait(0.1)

    threads = [threading.Thread(target=go_on, args=(talker,)) for talker in range(TALKERS)]
    for thread in threads:
        thread.start()
    browser.start_tracing(page=page, categories=["devtools.timeline", "disabled-by-default-devtools.timeline", "__metadata"])
    page.wait_for_timeout(seconds * 1000)
    trace = json.loads(browser.stop_tracing())
    ended.set()
    for thread in threads:
        thread.join()
    events: list[dict[str, Any]] = trace["traceEvents"]
    return events


def frames_of(events: Sequence[dict[str, Any]]) -> list[float]:
    """Of each frame: milliseconds of script on the page's main thread since the frame before, garbage collection included."""
    main = next((event["pid"], event["tid"]) for event in events if event["name"] == "FireAnimationFrame")
    mine = sorted((e for e in events if (e["pid"], e["tid"]) == main), key=lambda event: event["ts"])
    frames = [0.0]
    for event in mine:
        if event["name"] == "RunTask" and "tdur" in event:
            frames[-1] += event["tdur"] / 1000
        elif event["name"] in _DRAWING and "tdur" in event:
            frames[-1] -= event["tdur"] / 1000  # inside a task
        elif event["name"] == "Commit" and "tdur" in event:
            frames[-1] -= event["tdur"] / 1000
            frames.append(0.0)
    return frames[1:-1]


def chromium() -> str:
    """Raises SystemExit where there is none."""
    found = os.environ.get("PASTURE_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        sys.exit("no Chromium on this machine: install it, or set PASTURE_CHROMIUM")
    return found


def main() -> None:
    cost = measure()
    print(f"{cost.sessions:,} sessions, {cost.live_sequences} of them in the live cache, {cost.frames} frames")
    print(
        f"page    worst frame {cost.worst_frame_ms:.1f} ms, 99 % of frames {cost.p99_frame_ms:.1f} ms (limit {FRAME_MS:g} ms)"
    )
    print(f"sent    {cost.snapshot_bytes:,} bytes a look")
    print(f"server  {cost.server_share:.2%} of a core with a page open (limit {SERVER_SHARE:.0%})")
    sys.exit(0 if cost.within else 1)


if __name__ == "__main__":
    main()
