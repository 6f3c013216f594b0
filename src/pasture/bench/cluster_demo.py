"""`make demo-cluster`: three replicas of the small model, a chat, and the death of the replica that writes it.

Tells what happens as it happens: who writes, who was killed, how long the pause was, who went on, and whether the text is the
one that nobody disturbed. Starts a local cluster and ends it; in the caller's thread.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.request import Request, urlopen

from rich.console import Console

from pasture.bench.client import Endpoint, Json
from pasture.bench.cluster_process import ClusterProcess
from pasture.bench.systems import default_model
from pasture.core.errors import PastureError

REPLICAS = 3
QUESTION = "Explain to a child, step by step and at length, how a sheep becomes a warm sweater."
REPLY_TOKENS = 160
KILL_AFTER = 40
"""chunks of text"""


def main(*, stay: bool) -> int:
    """Exit status: 0 when the reply was whole, 1 otherwise, 130 when ended by Ctrl-C or SIGTERM."""
    console = Console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what it started ends with it, as after Ctrl-C
    try:
        return _play(console, stay=stay)
    except PastureError as error:
        console.print(f"[red]pasture cluster demo:[/] {error}", highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130


def _play(console: Console, *, stay: bool) -> int:
    threads = str(max(1, (os.cpu_count() or REPLICAS) // REPLICAS))
    console.print(
        f"Starting {REPLICAS} replicas of a small model and two ingresses, each a process of its own ...", highlight=False
    )
    flags = ("-m", str(default_model()), "-c", "4096", "-np", "8", "-t", threads)
    with tempfile.TemporaryDirectory() as folder, closing(ClusterProcess(Path(folder), *flags, replicas=REPLICAS)) as up:
        there = asyncio.run(up.until(lambda found: len(found) == REPLICAS))
        for one in there:
            console.print(f"  {one['replica']}: process {one['pid']} at {one['host']} port {one['port']}", highlight=False)
        console.print(f"\n[bold]{QUESTION}[/]\n", highlight=False)
        text, pause, killed = _disturbed(up, console)
        console.print(
            f"\n\n[bold]The longest pause was {pause:.1f} s.[/] The client saw that and nothing else.", highlight=False
        )
        whole = "".join(piece for piece in _stream(up.endpoint))
        same = "the same, to the letter" if whole == text else "not the same from some word on: recomputing rounds differently"
        console.print(f"The same question again, undisturbed: {same}.", highlight=False)
        back = asyncio.run(up.until(lambda found: len(found) == REPLICAS))
        fresh = next(one for one in back if one["replica"] == killed["replica"])
        console.print(f"{killed['replica']} is back as process {fresh['pid']}.", highlight=False)
        if stay:
            console.print(f"\nThe cluster serves at {up.endpoint.url}/v1 until Ctrl-C.", highlight=False)
            signal.pause()
    return 0 if killed["pid"] != fresh["pid"] and text else 1


def _disturbed(up: ClusterProcess, console: Console) -> tuple[str, float, Json]:
    """The reply, the longest pause in it, and who was killed on the way."""
    text, pause, last = "", 0.0, time.monotonic()
    killed: Json = {}
    for number, piece in enumerate(_stream(up.endpoint)):
        now = time.monotonic()
        if killed:
            pause = max(pause, now - last)
        last = now
        text += piece
        console.print(piece, end="", highlight=False, markup=False, soft_wrap=True)
        if number >= KILL_AFTER and not killed:
            there = asyncio.run(up.replicas())
            busy = [one for one in there if one["running"]]
            if busy:
                killed = busy[0]
                os.kill(int(str(killed["pid"])), signal.SIGKILL)
                last = time.monotonic()
                console.print(
                    f"[red] ⟪ {killed['replica']} writes this: process {killed['pid']} killed ⟫ [/]", end="", highlight=False
                )
    if not killed:
        raise PastureError("the reply was over before anybody could be killed")
    return text, pause, killed


def _stream(endpoint: Endpoint) -> Iterator[str]:
    """The pieces of the reply as they come."""
    body = {
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": REPLY_TOKENS,
        "ignore_eos": True,
        "stream": True,
    }
    request = Request(f"{endpoint.url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    with urlopen(request, timeout=120) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:])["choices"]
                if choices and choices[0]["delta"].get("content"):
                    yield choices[0]["delta"]["content"]
