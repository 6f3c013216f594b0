"""The benchmarks of what is done ahead, from end to end, without a model."""

from __future__ import annotations

import json
from pathlib import Path

import orjson
import pytest

from pasture.bench import foresight, returning, turn_ahead
from pasture.bench.options import BenchOptions, WorkloadName
from pasture.bench.run import main

FAKE = ("--fake-engine",)


def test_those_who_come_back_are_found(tmp_path: Path) -> None:
    options = BenchOptions(
        sessions=8, think=1.0, spread=0.3, ram_for=3, context=100, period=3.0, max_tokens=4, out=tmp_path, serve_flags=FAKE
    )
    assert returning.main(options) == 0
    result = orjson.loads((tmp_path / "result.json").read_bytes())
    on, off = (best["median"] for best in result["best"])
    assert [best["label"] for best in result["best"]] == ["prefetch on", "prefetch off"]
    for side in (on, off):
        assert side["requests"] > 0
        assert side["errors"] == 0
        assert side["computed_tokens"] < side["prompt_tokens"], "what was prepared is on the disk of both"
    known = orjson.loads((tmp_path / "prepared.json").read_bytes())
    kept = returning.kept(tmp_path / "prepared.json", known["load"])
    assert kept is not None
    assert len(kept.replies) == 8
    assert returning.kept(tmp_path / "prepared.json", known["load"] | {"reply": 5}) is None


def test_a_turn_after_reasoning_is_there_before_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert turn_ahead.main(BenchOptions(turns=1, think=0.5, out=tmp_path, as_json=True, serve_flags=FAKE)) == 0
    result = orjson.loads((tmp_path / "result.json").read_bytes())
    assert json.loads(capsys.readouterr().out) == result
    by_side = {turn["side"]: turn for turn in result["turns"]}
    suffix = len("<|im_end|>\n<|im_start|>assistant\n")  # the fake engine's tokens are characters
    assert by_side["turn-ahead on"]["beyond_tokens"] <= suffix
    assert by_side["turn-ahead off"]["beyond_tokens"] > suffix + 150


def test_a_workload_is_played_with_foresight_and_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foresight, "WORKLOADS", (WorkloadName.TEAM,))
    assert foresight.main(BenchOptions(users=2, turns=1, max_tokens=2, out=tmp_path, as_json=True, serve_flags=FAKE)) == 0
    result = orjson.loads((tmp_path / "result.json").read_bytes())
    assert set(result["ratios"]) == {"team"}
    assert all(one["cpu_seconds"] > 0 and not one["errors"] for one in result["played"])


def test_a_trace_is_replayed_and_its_blocks_are_shared(tmp_path: Path) -> None:
    rows = [{"timestamp": 100 * n, "input_length": 1024, "output_length": 64, "hash_ids": [0, 1 + n % 2]} for n in range(6)]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, rows)))
    options = BenchOptions(WorkloadName.TRACE, trace=trace, scale=1 / 16, speed=1.0, out=tmp_path, serve_flags=FAKE)
    assert main(options) == 0
    median = orjson.loads((tmp_path / "result.json").read_bytes())["best"][0]["median"]
    assert median["requests"] == 6
    assert median["computed_tokens"] <= 1.05 * median["distinct_tokens"]
    assert median["computed_tokens"] < 0.5 * median["prompt_tokens"]
