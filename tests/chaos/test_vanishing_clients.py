"""Five hundred clients connect to a server process, ask, and vanish at random moments: nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import random
import re
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest

from tests.e2e.test_serve_command import Server

N_CLIENTS = 500
SYSTEM = "You are a patient help desk for everybody. " * 20
LEFT_BEHIND_BYTES = 48 << 20
"""buffers and allocator slack after five hundred requests; one leaked conversation each would be ten times that"""


async def vanish(host: str, port: int, rng: random.Random) -> None:
    """Ask for a long stream and hang up: before the request is whole, before the answer, or in the middle of it."""
    await asyncio.sleep(rng.random() * 4)
    reader, writer = await asyncio.open_connection(host, port)
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"Question {rng.random()}?"}]
    body = json.dumps({"messages": messages, "stream": rng.random() < 0.8, "max_tokens": 400, "ignore_eos": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    whole = head + body
    writer.write(whole[: rng.randrange(len(whole))] if rng.random() < 0.2 else whole)
    await writer.drain()
    try:
        async with asyncio.timeout(rng.random() * 0.5):
            await reader.read(rng.choice([1, 4096, 1 << 20]))
    except TimeoutError:
        pass
    if rng.random() < 0.5:
        writer.transport.abort()
    else:
        writer.close()


def metric(url: str, name: str, label: str = "") -> float:
    with urlopen(f"{url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    rows = re.findall(rf"^{name}(\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
    return sum(float(value) for labels, value in rows if label in labels)


async def settled(url: str) -> None:
    """Until every request that was taken has ended, and no cell is held for one."""
    for _ in range(600):
        taken, ended, held = await asyncio.to_thread(
            lambda: (
                metric(url, "pasture_requests_submitted_total"),
                metric(url, "pasture_requests_finished_total"),
                metric(url, "pasture_kv_used_cells", 'state="running"'),
            )
        )
        if taken == ended and not held:
            return
        await asyncio.sleep(0.05)
    pytest.fail(f"{taken} requests taken, {ended} ended, {held} cells still held")


@pytest.mark.timeout(180)
async def test_five_hundred_clients_that_vanish_leave_nothing_behind(tmp_path: Path) -> None:
    server = Server(tmp_path, "-c", "16384", "-np", "64")
    try:
        process = psutil.Process(server.process.pid)
        host, port = server.url.removeprefix("http://").split(":")
        rng = random.Random(1)
        hello = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}
        before_text = server.post("/v1/chat/completions", hello)["choices"]
        await asyncio.gather(*(vanish(host, int(port), random.Random(i)) for i in range(100)))
        await settled(server.url)
        before = (process.memory_info().rss, process.num_fds(), process.num_threads())
        await asyncio.gather(*(vanish(host, int(port), random.Random(rng.random())) for _ in range(N_CLIENTS)))
        await settled(server.url)
        after = (process.memory_info().rss, process.num_fds(), process.num_threads())
        assert after[0] - before[0] < LEFT_BEHIND_BYTES
        assert after[1] <= before[1] + 2
        assert after[2] <= before[2] + 2
        assert metric(server.url, "pasture_requests_finished_total", 'reason="cancelled"') > N_CLIENTS / 4
        assert metric(server.url, "pasture_invariant_failures_total") == 0
        assert server.post("/v1/chat/completions", hello)["choices"] == before_text
        code, rest = server.end()
        assert code == 0
        assert "Traceback" not in rest
    finally:
        server.close()
