"""Recorded traffic: arrivals, lengths and sharing survive being made smaller."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pasture.bench.client import Exchange
from pasture.bench.drive import Target, play
from pasture.bench.options import BenchOptions, WorkloadName, parse_share
from pasture.bench.recorded import Arrival, arrivals
from pasture.bench.workloads import build
from pasture.core.errors import ConfigError
from tests.unit.bench.stub_openai import StubServer, serving

MOONCAKE = [
    {"timestamp": 4000, "input_length": 1100, "output_length": 64, "hash_ids": [0, 1, 2]},
    {"timestamp": 2000, "input_length": 1024, "output_length": 320, "hash_ids": [0, 1]},
    {"timestamp": 9000, "input_length": 700, "output_length": 1, "hash_ids": [0, 9]},
]
HELPER = {"t": 1, "type": "n", "in": 128, "out": 8, "hash_ranges": [[0, 0], [9, 9]]}
CODING = [
    {
        "block_size": 64,
        "requests": [
            {"t": 0, "type": "n", "in": 256, "out": 64, "hash_ranges": [[0, 3]]},
            {
                "t": 5,
                "type": "subagent",
                "requests": [{"t": 1, "type": "n", "in": 128, "out": 8, "hash_ranges": [[0, 0], [9, 9]]}],
            },
        ],
    },
    {"block_size": 64, "requests": [{"t": 0, "type": "n", "in": 128, "out": 8, "hash_ranges": [[0, 1]]}]},
]


def written(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file = folder / "trace.jsonl.gz"
    with gzip.open(file, "wt") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    return file


def scaled(file: Path, **options: Any) -> tuple[Arrival, ...]:
    return arrivals(BenchOptions(WorkloadName.TRACE, trace=file, **{"scale": 1 / 64, "speed": 2.0} | options))


def common(one: str, two: str) -> int:
    """Words that two texts have in common from their beginning."""
    pairs = list(zip(one.split(), two.split(), strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


def test_requests_come_when_they_came_and_are_as_long_as_they_were(tmp_path: Path) -> None:
    found = scaled(written(tmp_path, MOONCAKE))
    assert [one.at_seconds for one in found] == [0.0, 1.0, 3.5]
    assert [len(one.text.split()) for one in found] == [16, 17, 11]
    assert [one.prompt_tokens for one in found] == [16, 17, 11]
    assert [one.reply_tokens for one in found] == [5, 1, 1]


def test_prompts_share_what_their_blocks_share(tmp_path: Path) -> None:
    first, longer, other = scaled(written(tmp_path, MOONCAKE))
    assert longer.text.startswith(first.text)
    assert common(first.text, other.text) == 8


def test_blocks_of_coding_sessions_are_their_own(tmp_path: Path) -> None:
    found = scaled(written(tmp_path, CODING), scale=1.0, speed=1.0, session_every=10.0)
    assert [one.at_seconds for one in found] == [0.0, 6.0, 10.0]
    main, helper, stranger = found
    assert common(main.text, helper.text) == 64
    assert common(main.text, stranger.text) < 8
    assert [one.reply_tokens for one in found] == [64, 8, 8]


def test_only_the_beginning_is_played(tmp_path: Path) -> None:
    assert len(scaled(written(tmp_path, MOONCAKE), requests=2)) == 2


@pytest.mark.parametrize(
    "line", ["", "{}", "[1]", '{"timestamp": "x", "input_length": 1, "output_length": 1, "hash_ids": []}', "{"]
)
def test_what_is_no_trace_is_a_clear_error(tmp_path: Path, line: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(line)
    with pytest.raises(ConfigError, match=str(file)):
        scaled(file)


def test_a_trace_has_to_be_named() -> None:
    with pytest.raises(ConfigError, match="needs a file"):
        arrivals(BenchOptions(WorkloadName.TRACE))


async def test_a_trace_is_played_at_its_times(tmp_path: Path) -> None:
    options = BenchOptions(WorkloadName.TRACE, trace=written(tmp_path, MOONCAKE), scale=1 / 64, speed=100.0)
    workload = build(options)
    assert workload.n_requests == 3
    assert workload.longest_tokens > 17
    async with serving(StubServer()) as stub:
        exchanges: list[Exchange] = await play(workload, Target(stub.endpoint, "stub", 10.0))
    sent = sorted(exchange.sent for exchange in exchanges)
    assert sent[2] - sent[0] >= 0.069
    assert sorted(exchange.chat.max_tokens for exchange in exchanges) == [1, 1, 5]


@pytest.mark.parametrize(("text", "number"), [("0.25", 0.25), ("1/32", 1 / 32), (2.0, 2.0)])
def test_a_share_is_a_number_or_a_fraction(text: str | float, number: float) -> None:
    assert parse_share(text) == number


@pytest.mark.parametrize("text", ["", "x", "1/0", "1/x"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a number"):
        parse_share(text)
