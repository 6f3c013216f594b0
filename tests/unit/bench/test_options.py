from __future__ import annotations

import dataclasses

import pytest

from pasture.bench.measure import Figures
from pasture.bench.options import LEVEL_NAMES, BenchOptions, Limit, parse_against, parse_slo
from pasture.core.errors import ConfigError


def test_a_service_level_is_read_in_seconds() -> None:
    assert parse_slo("ttft_p95=4s, itl_p95=400ms") == (Limit("ttft_p95", 4.0), Limit("itl_p95", 0.4))


@pytest.mark.parametrize("text", ["ttft_p95", "ttft_p95=4", "speed=4s", "ttft_p95=1.2.3s", "ttft_p95=-1s"])
def test_a_service_level_that_cannot_be_read_names_those_that_can(text: str) -> None:
    with pytest.raises(ConfigError, match="ttft_p95"):
        parse_slo(text)


def test_every_level_is_a_figure() -> None:
    assert {f"{name}_seconds" for name in LEVEL_NAMES} <= {field.name for field in dataclasses.fields(Figures)}


def test_peers_come_repeated_and_comma_separated_and_count_once() -> None:
    given = ["isolated,llama-server", "http://host:1/v1", "isolated"]
    assert parse_against(given) == ("isolated", "llama-server", "http://host:1/v1")


def test_an_unknown_peer_is_refused() -> None:
    with pytest.raises(ConfigError, match="vllm"):
        parse_against(["vllm"])


@pytest.mark.parametrize("wrong", [{"users": 0}, {"repeat": 0}, {"cells": 0}, {"turns": -1}, {"think_time": -1.0}])
def test_impossible_numbers_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        BenchOptions(**wrong)  # type: ignore[arg-type]
