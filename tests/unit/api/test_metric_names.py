"""Metrics by Prometheus' own rules (units, suffixes, few labels), and a Grafana dashboard that asks for none that is absent."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.unit.stub_service import StubService

DASHBOARD = Path(__file__).parents[3] / "deploy" / "grafana-dashboard.json"
LABELS = {"state", "source", "reason", "tier", "form", "kind", "le", "layout", "peer", "why"}
"""each with a handful of values: no user, key, session, file or conversation"""
UNITS = ("seconds", "bytes", "tokens", "cells", "blocks", "ratio", "tokens_per_second", "bytes_per_second")
COUNTED = (
    *("requests", "sequences", "steps", "swaps", "errors", "refusals", "compactions", "moves", "shifts", "failures"),
    *("rejected", "submitted", "finished", "conversations", "cancelled"),
)
"""things that are their own unit"""
STATES = ("pasture_draining", "pasture_peer_up")


@pytest.fixture
async def families(client: httpx.AsyncClient) -> list[Metric]:
    await client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 3})
    found = text_string_to_metric_families((await client.get("/metrics")).text)
    # the parser takes the moment at which a series began for a metric of its own
    return [family for family in found if not family.name.endswith("_created")]


async def test_names_have_units_and_counters_end_in_total(families: list[Metric]) -> None:
    for family in families:
        assert re.fullmatch(r"pasture_[a-z0-9_]+", family.name)
        ends = tuple(f"_{unit}" for unit in (*UNITS, *COUNTED))
        assert family.name.endswith(ends) or family.name in STATES, f"{family.name} has no unit"
        assert family.documentation, family.name
        if family.type == "counter":
            assert all(sample.name.endswith(("_total", "_created")) for sample in family.samples)
        else:
            assert not family.name.endswith("_total"), family.name


async def test_labels_are_few_and_none_is_anybodys(families: list[Metric]) -> None:
    labels = {label for family in families for sample in family.samples for label in sample.labels}
    assert labels <= LABELS
    for family in families:
        assert len(family.samples) <= 64, f"{family.name} has {len(family.samples)} series"


async def test_the_number_of_series_does_not_grow_with_who_asks(client: httpx.AsyncClient, service: StubService) -> None:
    counts = []
    for user in range(3):
        await client.post("/v1/completions", json={"prompt": f"Hello {user}", "max_tokens": 3, "user": f"user {user}"})
        counts.append((await client.get("/metrics")).text.count("\n"))
    assert len(service.requests) == 3
    assert len(set(counts)) == 1


def asked() -> Iterator[str]:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]


async def test_every_metric_of_the_grafana_dashboard_is_exported(families: list[Metric]) -> None:
    exported: dict[str, set[str]] = {}
    for family in families:
        exported.setdefault(family.name, set())
        for sample in family.samples:
            exported.setdefault(sample.name, set()).update(sample.labels)
        if family.type == "counter":
            exported.setdefault(f"{family.name}_total", set())
    expressions = list(asked())
    names = {name for expression in expressions for name in re.findall(r"\bpasture_\w+", expression)}
    assert len(names) > 20
    assert names <= set(exported)
    for expression in expressions:
        for labels in re.findall(r"by \(([^)]*)\)", expression):
            (name, *_) = re.findall(r"pasture_\w+", expression)
            wanted = {label.strip() for label in labels.split(",")}
            assert wanted <= exported[name] or not exported[name], f"{name} has no {wanted - exported[name]}"


def test_the_dashboards_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
