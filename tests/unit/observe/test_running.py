"""The doctor's rules over a server's own numbers: each planted fault is found, and a healthy server is healthy."""

from __future__ import annotations

import copy
from typing import Any

import httpx
import pytest

from pasture.api import create_app
from pasture.observe import examine_server
from tests.unit.stub_service import StubService


@pytest.fixture
async def healthy() -> dict[str, Any]:
    """What a server answers, with the stub's few blemishes taken out."""
    transport = httpx.ASGITransport(create_app(StubService()))
    async with httpx.AsyncClient(transport=transport, base_url="http://pasture") as client:
        paths = {"live": "/v1/live/now", "diagnosis": "/v1/diagnosis", "props": "/props"}
        answers = {name: (await client.get(path)).json() for name, path in paths.items()}
    answers["live"]["gate"]["refusals"] = {}
    for tier in answers["live"]["tiers"]:
        tier["errors"] = 0
    return answers


def names(answers: dict[str, Any]) -> list[str]:
    return [finding.name for finding in examine_server(**answers)]


def facts(answers: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(c for c in answers["diagnosis"]["checks"] if c["name"] == "low_hit_rate")["facts"]
    return found


async def test_a_healthy_server_has_nothing_wrong(healthy: dict[str, Any]) -> None:
    assert names(healthy) == []


async def test_each_planted_fault_is_found_alone(healthy: dict[str, Any]) -> None:
    def plant(name: str) -> dict[str, Any]:
        answers = copy.deepcopy(healthy)
        live = answers["live"]
        ram = live["tiers"][0]
        match name:
            case "pool_too_small":
                facts(answers)["evicted_cells"] = {"cells": 9000}
                live["requests"]["swapped"] = 2
            case "wrong_layout":
                live["pool"]["layout"] = "streams"
                live["prefixes"] = [[1, None, 0, 0, 90, 3, 3, 0.0]]
            case "turned_away":
                live["requests"]["rejected"] = 4
            case "tier_slower_than_computing":
                live["gate"]["refusals"] = {"spill": 3}
                live["tiers"][1]["bytes_per_second"] = 4e3
            case "tier_errors":
                ram["errors"] = 1
            case "tier_too_small":
                ram |= {"evicted_blocks": 500, "hit_tokens": 10, "missed_tokens": 90}
            case "no_replica":
                live["cluster"] = {"replicas": []}
            case "not_shareable":
                answers["props"]["model"]["shareable"] = False
            case "interference":
                check = next(c for c in answers["diagnosis"]["checks"] if c["name"] == "interference")
                check |= {"status": "warning", "message": "a bug to report: the books did not agree"}
        return answers

    for name in ("pool_too_small", "wrong_layout", "turned_away", "tier_slower_than_computing", "tier_errors",
                 "tier_too_small", "no_replica", "not_shareable", "interference"):  # fmt: skip
        assert names(plant(name)) == [name]


async def test_a_pool_that_is_too_small_is_told_a_next_step(healthy: dict[str, Any]) -> None:
    facts(healthy)["evicted_cells"] = {"cells": 9_000_000}
    healthy["live"]["requests"]["swapped"] = 1
    (finding,) = examine_server(**healthy)
    assert f"--kv-cells {100 + 4096}" in finding.advice, "what was evicted in months is no size"


async def test_a_refusal_alone_is_no_slow_tier(healthy: dict[str, Any]) -> None:
    """Of a few tokens that a conversation ends in, say, which are always computed sooner."""
    healthy["live"]["gate"]["refusals"] = {"fetch": 300, "spill": 300}
    assert names(healthy) == []


async def test_a_tier_that_answers_late_is_slow(healthy: dict[str, Any]) -> None:
    healthy["live"]["gate"]["refusals"] = {"fetch": 3}
    healthy["live"]["tiers"][1]["latency_seconds"] = 4.0
    (finding,) = examine_server(**healthy)
    assert "4 s from there" in finding.evidence
    assert "3.1 s to compute" in finding.evidence


@pytest.mark.parametrize(("kind", "name"), [("rejected", "turned_away"), ("errors", "tier_errors")])
async def test_a_counter_tells_of_now_or_of_much(healthy: dict[str, Any], kind: str, name: str) -> None:
    def counted(rejected: int, blocks: int, submitted: int) -> dict[str, Any]:
        live: dict[str, Any] = copy.deepcopy(healthy["live"])
        if kind == "rejected":
            live["requests"] |= {"rejected": rejected, "submitted": submitted}
        else:
            live["tiers"][0] |= {"errors": rejected, "blocks": blocks}
        return live

    def told(before: int, now: int) -> list[str]:
        answers = healthy | {"live": counted(now, 1000, 1000), "before": counted(before, 1000, 1000)}
        return [finding.name for finding in examine_server(**answers)]

    assert told(5, 5) == [], "five in a thousand, once"
    assert told(5, 6) == [name], "it goes on"
    assert told(50, 50) == [name], "one in twenty"
