from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from pasture.api import pressure
from pasture.api.diagnosis import hit_rate, interference, memory_growth, memory_pressure, slowed_by
from pasture.api.explanations import Past, explain
from pasture.api.pressure import Memory, read_memory
from pasture.core.statistics import ServiceStatistics, Verification
from pasture.core.storage import StoreStatistics, TierStatistics
from pasture.core.values import Usage, Whereabouts
from pasture.sessions.state import State, Sweeper
from tests.session_support import world
from tests.unit.api.conftest import Connect
from tests.unit.api.test_limits import client_of
from tests.unit.api.wire import CHAT, chat_body, events
from tests.unit.stub_service import CHAT_TEMPLATE, ByteVocabulary, StubService

TIER = TierStatistics("ram", 1, 100, 100, 0, 0, {}, 0, 0, 0, 0, 0, 3, 0, 0.0, 0.0)


def statistics(**pool: object) -> ServiceStatistics:
    found = StubService().statistics()
    return replace(found, pool=replace(found.pool, **pool))  # type: ignore[arg-type]


async def test_a_healthy_server_says_so(client: httpx.AsyncClient) -> None:
    told = (await client.get("/v1/diagnosis")).json()
    assert told["ok"] is True
    statuses = {check["name"]: check["status"] for check in told["checks"]}
    assert statuses == {
        "low_hit_rate": "unknown",
        "interference": "ok",
        "memory_growth": "ok",
        "memory_pressure": "ok",
        "slowed_by": "ok",
    }
    assert told["checks"][2]["facts"]["state"] == {"sessions": 0, "responses": 0, "turns": 0, "bytes": 0}


async def test_broken_books_are_told(connect: Connect) -> None:
    told = (await connect(StubService(broken=True)).get("/v1/diagnosis")).json()
    assert told["ok"] is False
    assert "a cell too many" in told["checks"][1]["message"]


def test_hit_rates_and_what_to_do_about_them() -> None:
    assert hit_rate(statistics(hit_tokens={"idle": 9000}, missed_tokens=2000)).status == "ok"
    early = hit_rate(statistics(hit_tokens={}, missed_tokens=20_000, evicted_cells={}))
    assert (early.status, "at their beginning" in early.message) == ("warning", True)
    small = hit_rate(statistics(hit_tokens={}, missed_tokens=20_000, evicted_cells={"cells": 9999}))
    assert "small for the traffic" in small.message


def test_growth_past_a_budget_is_told() -> None:
    assert memory_growth(statistics(used_cells=5000), {}, None).status == "warning"
    found = StubService().statistics()
    over = replace(found, store=replace(found.store, tiers=(replace(TIER, bytes=201),)))
    assert "ram" in memory_growth(over, {}, None).message
    pinned = replace(found, store=StoreStatistics((replace(TIER, bytes=201, pinned_bytes=101),), 0, 0, 0, {}))
    assert memory_growth(pinned, {}, None).status == "ok"
    assert "16 restored tokens" in interference(over, Verification(16, 0)).message
    differing = interference(over, Verification(16, 8))
    assert (differing.status, "8 are not what was stored" in differing.message) == ("warning", True)
    assert "3 damaged" in interference(over, Verification()).message


def test_a_sweeper_that_has_ended_or_does_not_come_round_is_told() -> None:
    found = StubService().statistics()
    assert "12 s ago" in memory_growth(found, {}, Sweeper(True, 60.0, 12.0)).message
    for late in (Sweeper(False, 60.0, 12.0), Sweeper(True, 60.0, 400.0)):
        told = memory_growth(found, {}, late)
        assert (told.status, told.facts["sweeper"]) == ("warning", asdict(late))


def cache_of(answer: Mapping[str, Any]) -> Any:
    return answer["pasture"]["choices"][0]["cache"]


async def test_a_request_that_asks_is_told_where_its_prompt_was(client: httpx.AsyncClient) -> None:
    answer = (await client.post(CHAT, json=chat_body(pasture=True))).json()
    assert cache_of(answer) == {
        "prompt_tokens": 21,
        "cached_tokens": 3,
        "computed_tokens": 18,
        "found": {"live": 21, "shared": 2, "ram": 5},
        "first_missed_position": 3,
        "reason": "new",
    }
    streamed = (await client.post(CHAT, json=chat_body(pasture=True, stream=True))).text
    assert cache_of(events(streamed)[-2]) == cache_of(answer)
    assert "pasture" not in (await client.post(CHAT, json=chat_body())).json()


async def test_in_a_session_the_reason_is_known() -> None:
    async with world(["one"]) as at, at.http("one") as client:
        made = (await client.post("/sessions", json={"messages": [{"role": "system", "content": "Be kind. " * 30}]})).json()[
            "id"
        ]

        async def ask(**fields: object) -> Any:
            body = {"session_id": made, "max_tokens": 2, "pasture": True, **fields}
            return cache_of((await client.post("/chat/completions", json=body)).json())

        hi = {"role": "user", "content": "Hi"}
        assert (await ask(messages=[hi]))["reason"] == "new"
        assert (await ask(messages=[hi]))["reason"] == "new"
        edited = await ask(messages=[{"role": "system", "content": "Be brief."}, hi], session_mode="replace")
        assert (edited["reason"], edited["first_edited_message"]) == ("edited_history", 0)


async def test_other_tools_are_the_reason_where_the_same_was_said() -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    vocabulary = ByteVocabulary(chat_template="{{ tools }}" + CHAT_TEMPLATE)
    service, state = StubService(vocabulary=vocabulary, found=Whereabouts(0, 0, 0)), State()
    async with client_of(service, state) as client:
        said = [{"role": "system", "content": "Be kind. " * 30}]
        made = (await client.post("/v1/sessions", json={"messages": said, "tools": [tool]})).json()["id"]

        async def ask(**fields: object) -> Any:
            body = {"session_id": made, "messages": [{"role": "user", "content": "Hi"}], "pasture": True, **fields}
            return cache_of((await client.post(CHAT, json=body)).json())["reason"]

        assert await ask() == "new"
        changed = {**tool, "function": {"name": "see", "parameters": {"type": "object"}}}
        assert await ask(tools=[changed]) == "template_changed"
        assert await ask() == "evicted", "the session remembers its tools"
    state.close()


USED = Usage(prompt_tokens=1000, cached_tokens=200, completion_tokens=1)
NOWHERE = Whereabouts(200, 0, 200)


@pytest.mark.parametrize(
    ("found", "n_asked", "past", "reason"),
    [
        (NOWHERE, 192, None, "new"),
        (NOWHERE, 960, None, "evicted"),
        (NOWHERE, 192, Past(230), "new"),
        (NOWHERE, 192, Past(900), "evicted"),
        (NOWHERE, 192, Past(900, edited_at=2), "edited_history"),
        (NOWHERE, 192, Past(900, edited_at=2, template_changed=True), "template_changed"),
        (NOWHERE, 192, Past(230, template_changed=True), "new"),
        (NOWHERE, 960, Past(900, template_changed=True), "evicted"),
        (replace(NOWHERE, ram_tokens=900), 960, Past(900), "not_fetched"),
        (replace(NOWHERE, slow_tokens={"remote": 900}), 960, None, "not_fetched"),
    ],
)
def test_reasons(found: Whereabouts, n_asked: int, past: Past | None, reason: str) -> None:
    told = explain(USED, found, n_asked, past)
    assert told["reason"] == reason
    assert told["found"] == {"live": 200, "shared": 0, "ram": found.ram_tokens, **found.slow_tokens}
    assert explain(replace(USED, cached_tokens=999), found, n_asked, past)["reason"] is None


async def test_what_has_made_way_is_told_from_what_is_new_without_a_session() -> None:
    service, state = StubService(), State()
    async with client_of(service, state) as client:
        text = "Read this first. " * 20
        service.found = Whereabouts(0, 0, 0)
        for reason in ("new", "evicted"):
            answer = (await client.post("/v1/completions", json={"prompt": text, "pasture": True})).json()
            assert cache_of(answer)["reason"] == reason
    state.close()


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        (Memory(300 << 20, 4 << 30, 0.0), "300 MiB of the server are swapped out"),
        (Memory(0, 50 << 20, None), "50 MiB of memory left"),
        (Memory(0, 4 << 30, 12.4), "waited for memory in 12 % of the last minute"),
    ],
)
def test_a_machine_short_of_memory_is_told(memory: Memory, said: str) -> None:
    check = memory_pressure(memory)
    assert check.status == "warning"
    assert said in check.message


def test_memory_is_read_from_what_the_system_tells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, stalls = tmp_path / "status", tmp_path / "pressure"
    status.write_text("VmRSS:\t  100 kB\nVmSwap:\t  2048 kB\n")
    stalls.write_text("some avg10=9.00 avg60=8.00 avg300=7.00 total=1\nfull avg10=0.00 avg60=6.50 avg300=0.00 total=1\n")
    monkeypatch.setattr(pressure, "_STATUS", status)
    monkeypatch.setattr(pressure, "_PRESSURE", stalls)
    found = read_memory()
    assert (found.swapped_bytes, found.stalled_percent) == (2 << 20, 6.5)
    monkeypatch.setattr(pressure, "_PRESSURE", tmp_path / "absent")
    assert read_memory().stalled_percent is None


def test_what_the_self_check_turned_off_is_told() -> None:
    reason = "self-check: a trial run was killed by SIGILL; repacked weight buffers (use_extra_bufts) turned off"
    check = slowed_by(replace(StubService().model, slowed_by=(reason,)))
    assert check.status == "warning"
    assert "repacked weight buffers" in check.message.partition("; ")[0]
