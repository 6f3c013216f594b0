"""The benchmark from end to end: the baseline on the real model, and a whole run against pasture's fake engine."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from pasture.bench.client import Chat, Endpoint, call, chat
from pasture.bench.options import BenchOptions
from pasture.bench.overhead import http_throughput
from pasture.bench.run import main
from pasture.bench.systems import Size, default_model, running, variants

BASELINE = Size(users=2, longest_tokens=200, cells=512)


@pytest.fixture(params=["request", "step"])
async def baseline(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncGenerator[Endpoint]:
    systems = variants("isolated", BASELINE, BenchOptions(model=default_model(), threads=1))
    (system,) = (system for system in systems if request.param in system.variant)
    async with running(system, tmp_path / "isolated.log"):
        yield system.endpoint


def question(user: str, *said: str) -> Chat:
    roles = ("system", "user", "assistant", "user")
    return Chat(user, tuple({"role": role, "content": text} for role, text in zip(roles, said, strict=False)), max_tokens=4)


@pytest.mark.model
async def test_a_context_reuses_its_own_conversation_and_no_other(baseline: Endpoint) -> None:
    opening = "You answer in one word, whatever the question may be. " * 3
    first = await chat(baseline, question("Ada", opening, "Hi?"), timeout_seconds=60)
    assert (first.error, first.cached_tokens, first.completion_tokens) == (None, 0, 4)
    again = await chat(baseline, question("Ada", opening, "Hi?", first.reply, "And?"), timeout_seconds=60)
    assert again.prompt_tokens is not None
    assert first.prompt_tokens is not None
    assert again.cached_tokens is not None
    assert again.cached_tokens >= first.prompt_tokens
    other = await chat(baseline, question("Bruno", opening, "Hi?"), timeout_seconds=60)
    assert (other.error, other.cached_tokens) == (None, 0)
    assert other.reply == first.reply


@pytest.mark.model
async def test_a_conversation_too_long_for_its_context_is_refused(baseline: Endpoint) -> None:
    exchange = await chat(baseline, question("Ada", "word " * 300), timeout_seconds=60)
    assert "do not fit" in str(exchange.error)
    fitting = await chat(baseline, replace(question("Ada", "Hi?"), max_tokens=2), timeout_seconds=60)
    assert fitting.error is None
    status, _ = await call(baseline, "/nowhere")
    assert status == 404


def test_a_whole_benchmark_on_the_fake_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = BenchOptions(users=3, turns=2, max_tokens=4, repeat=2, out=tmp_path, serve_flags=("--fake-engine",))
    assert main(options) == 0
    result = orjson.loads((tmp_path / "result.json").read_bytes())
    assert len(result["runs"]) == 2
    median = result["best"][0]["median"]
    assert (median["requests"], median["errors"], median["generated_tokens"]) == (12, 0, 24)
    assert median["computed_tokens"] == median["counted_tokens"]
    assert median["computed_tokens"] <= 1.05 * median["distinct_tokens"]
    assert (tmp_path / "report.html").stat().st_size > 100_000
    assert "computed / distinct" in capsys.readouterr().out


async def test_the_fake_engine_streams_over_every_connection_without_an_error(tmp_path: Path) -> None:
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    carried = await http_throughput(BenchOptions(seconds=0.5), tmp_path)
    assert carried.errors == ()
    assert carried.tokens_per_second > 0
    if affinity is not None:
        assert os.sched_getaffinity(0) == affinity


def test_a_system_that_does_not_start_is_one_line_and_a_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = BenchOptions(users=1, model=tmp_path / "missing.gguf", out=tmp_path)
    assert main(options) == 1
    told = capsys.readouterr().out
    assert "before it was ready" in told
    assert "Traceback" not in told
