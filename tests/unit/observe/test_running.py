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
                live["gate"]["refusals"] = {"fetch": 3}
            case "tier_errors":
                ram["errors"] = 1
            case "tier_too_small":
                ram |= {"evicted_blocks": 500, "hit_tokens": 10, "missed_tokens": 90}
            case "not_shareable":
                answers["props"]["model"]["shareable"] = False
            case "interference":
                check = next(c for c in answers["diagnosis"]["checks"] if c["name"] == "interference")
                check |= {"status": "warning", "message": "a bug to report: the books did not agree"}
        return answers

    for name in ("pool_too_small", "wrong_layout", "turned_away", "tier_slower_than_computing", "tier_errors",
                 "tier_too_small", "not_shareable", "interference"):  # fmt: skip
        assert names(plant(name)) == [name]


async def test_a_pool_that_is_too_small_is_told_a_size_that_would_do(healthy: dict[str, Any]) -> None:
    facts(healthy)["evicted_cells"] = {"cells": 9000}
    healthy["live"]["requests"]["swapped"] = 1
    (finding,) = examine_server(**healthy)
    assert "--kv-cells 9100" in finding.advice
