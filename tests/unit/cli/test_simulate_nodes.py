"""`pasture simulate --nodes`: the table, the JSON, and that both say what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pasture.cli.main import main
from pasture.cluster.simulated import RULES
from pasture.foresight.nodes import LoadModel
from tests.unit.foresight.traffic import traffic


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    file = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": r.at * 1000, "input_length": r.n_tokens, "output_length": 20, "hash_ids": r.blocks} for r in traffic(60)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["simulate", *map(str, arguments)])
    return int(ended.value.code or 0)


def test_json_has_every_rule_and_the_load_model(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(trace, "--nodes", "3", "--capacity", "60k", "--policy", "lru", "--prefill-rate", "2000", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["simulated"] is True
    assert (document["nodes"], document["capacity_tokens"], document["policy"]) == (3, 60_000, "lru")
    assert document["load_model"]["prefill_tokens_per_second"] == 2000
    assert document["load_model"]["token_seconds"] == LoadModel().token_seconds
    assert [result["rule"] for result in document["results"]] == list(RULES)
    for result in document["results"]:
        assert result["requests"] == 60
        assert result["hit_ratio"] * result["prompt_tokens"] == pytest.approx(result["own_tokens"] + result["pulled_tokens"])
        assert result["share_of_pool"] == pytest.approx(result["hit_ratio"] / document["pool_hit_ratio"])
        assert len(result["node_seconds"]) == 3
        assert max(result["node_seconds"]) / (sum(result["node_seconds"]) / 3) == pytest.approx(result["max_over_mean_load"])
    assert sum(document["results"][0]["decisions"].values()) == 60


def test_the_table_says_that_it_is_simulated_and_what_is_assumed(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(trace, "--nodes", "2", "--capacity", "60k", "--in-flight", "2", "--no-references") == 0
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("Simulated: 2 nodes", "Assumed, not measured", "8,000 tokens/s", "2 a node kept in flight", "pasture"):
        assert words in printed
    assert "dynamo" not in printed


def test_what_does_not_go_together_is_one_line(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(trace, "--in-flight", "2") == 2
    assert run(trace, "--nodes", "2", "--capacity", "20k,40k") == 2
    assert run(trace, "--nodes", "2", "--disk", "100k") == 2
    assert "Traceback" not in capsys.readouterr().err
