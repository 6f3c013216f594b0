"""`pasture top`: the numbers of a running server in a terminal, over its public route, or one line that says why not."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from pasture.cli import top, top_picture
from pasture.web import Live, Recent
from tests.unit.stub_service import StubService

URL = "http://herd:8080"


def snapshot() -> Any:
    recent = Recent(lambda: 1.0)
    recent.add(0.25)
    return json.loads(Live(StubService().statistics, lambda: "stub", lambda: 1.0, recent, recent).snapshot())


def drawn(shown: Any, history: list[float]) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(top_picture.picture(shown, history, URL))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_picture_has_the_dashboards_numbers() -> None:
    text = drawn(snapshot(), [0.0, 5.0, 10.0])
    for expected in ("stub at http://herd:8080", "70 prompt tokens reused (70 %)", "3 replying, 2 reading, 1 waiting",
                     "p50 250 ms", "2 % of 4,096 cells", "2.93 KiB of 9.766 KiB, 3 blocks", "▄█"):  # fmt: skip
        assert expected in text
    assert "draining" not in text


def test_the_strip_adds_up_and_shows_shared_first() -> None:
    pool = {"shared_cells": 25, "running_cells": 50, "used_cells": 75, "cells": 100}
    strip = top_picture._strip(pool).plain
    assert strip == "█" * 36 + "▒" * 18 + "·" * 18


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.25, "250 ms"), (9.14, "9.1 s"), (59.7, "1 min 0 s"), (547.02, "9 min 7 s"), (3599.8, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_times_are_said_as_the_dashboard_says_them(seconds: float, words: str) -> None:
    shown = snapshot()
    shown["headline"]["saved_seconds"] = seconds
    assert f"computed   {words} of computing saved" in drawn(shown, [0.0])


def test_names_from_the_server_are_text_and_not_markup() -> None:
    shown = snapshot() | {"model": "[red]evil[/]"}
    assert "[red]evil[/]" in drawn(shown, [0.0])


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (401, b"{}", "--api-key"),
        (404, b"{}", "is it a pasture server"),
        (200, b"[]", "is it a pasture"),
        (200, b"<p>", "is it"),
    ],
)
async def test_what_is_in_the_way_is_one_clear_line(
    status: int, body: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pasture.bench import client

    async def answer(*_: object, **__: object) -> tuple[int, bytes]:
        return status, body

    monkeypatch.setattr(client, "call", answer)
    with pytest.raises(top.NoNumbers, match=reason):
        await top.look(client.Endpoint.parse(URL))


async def test_a_server_that_is_not_there_is_one_clear_line() -> None:
    from pasture.bench.client import Endpoint

    with pytest.raises(top.NoNumbers, match="cannot be reached"):
        await top.look(Endpoint.parse("http://127.0.0.1:1"))
