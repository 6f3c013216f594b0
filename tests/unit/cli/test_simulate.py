"""`pasture simulate`: the table, the JSON and the plot, and what it says of wrong arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pasture.cli.main import main
from pasture.cli.simulate import parse_tokens, short
from pasture.core.errors import ConfigError
from tests.unit.foresight.traffic import traffic


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    file = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": r.at * 1000, "input_length": r.n_tokens, "output_length": 1, "hash_ids": r.blocks} for r in traffic(200)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["simulate", *map(str, arguments)])
    return int(ended.value.code or 0)


def test_json_has_the_policy_and_its_references(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(trace, "--capacity", "20k,40k", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert [(r["policy"], r["capacity_tokens"]) for r in document["results"]] == [
        (policy, tokens) for tokens in (20_000, 40_000) for policy in ("foresight", "lru", "s3fifo", "belady")
    ]
    ours, lru, _, best = document["results"][:4]
    assert lru["hit_ratio"] < ours["hit_ratio"] < best["hit_ratio"] <= document["unbounded_hit_ratio"]
    assert (lru["way_from_lru_to_belady"], best["way_from_lru_to_belady"]) == (0, 1)
    assert ours["block_operations"] == lru["block_operations"] == sum(len(r.blocks) for r in traffic(200))


def test_without_references_there_is_one_line(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(trace, "--policy", "s3fifo", "--no-references", "--json") == 0
    [only] = json.loads(capsys.readouterr().out)["results"]
    assert only["policy"] == "s3fifo"
    assert only["way_from_lru_to_belady"] is None


def test_the_table_and_the_plot(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("plotly")
    plot = tmp_path / "plot.html"
    assert run(trace, "--capacity", "20k", "--plot", plot) == 0
    printed = capsys.readouterr().out
    for word in ("foresight", "lru", "s3fifo", "belady", "20k"):
        assert word in printed
    assert "without bounds" in plot.read_text()


def test_what_cannot_be_done_is_one_line(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "none.jsonl") == 2
    assert run(trace, "--capacity", "many") == 2
    assert run(trace, "--capacity", "20k", "--no-references", "--plot", tmp_path / "no" / "where.html") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_two_tiers_as_json(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(trace, "--capacity", "20k", "--disk", "1M", "--cell-bytes", "100", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    lines = {(r["policy"], r["ahead"]): r for r in document["results"]}
    assert list(lines) == [("lru", "off"), *(("foresight", a) for a in ("off", "returns", "hints", "paths")), ("belady", "off")]
    lru, paths = lines["lru", "off"], lines["foresight", "paths"]
    assert lru["precision"] is None
    assert lru["recall"] == 0
    assert lru["read_bytes"] == 512 * 100 * lru["lifted_blocks"]
    assert paths["recall"] == paths["ahead_used_blocks"] / lru["lifted_blocks"] > 0
    assert paths["ram_hit_ratio"] > lru["ram_hit_ratio"]
    assert paths["ram_hit_ratio"] + paths["disk_hit_ratio"] == pytest.approx(document["unbounded_hit_ratio"])
    assert 0 <= document["foreseeable_share_of_returns"] <= 1


def test_two_tiers_as_a_table_and_a_plot(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("plotly")
    monkeypatch.setenv("COLUMNS", "200")
    plot = tmp_path / "plot.html"
    assert run(trace, "--policy", "lru", "--capacity", "20k", "--disk", "1M", "--plot", plot) == 0
    printed = capsys.readouterr().out
    for word in ("lru", "paths", "belady", "precision", "RAM 20,000 tokens", "could be in this RAM"):
        assert word in printed
    assert "returns" not in printed.splitlines()[4], "lru expects nobody"
    assert "without bounds" in plot.read_text()


@pytest.mark.parametrize("wrong", [("--disk", "20k"), ("--disk", "much"), ("--disk", "1M", "--capacity", "20k,40k")])
def test_a_disk_that_makes_no_sense_is_one_line(
    trace: Path, wrong: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(trace, "--capacity", "20k", *wrong) == 2
    assert "--disk" in capsys.readouterr().err or "much" in wrong


def test_tokens() -> None:
    assert [parse_tokens(text) for text in ("250k", "1M", " 1.5m", "2G", "4096")] == [
        250_000,
        10**6,
        1_500_000,
        2 * 10**9,
        4096,
    ]
    for wrong in ("", "k", "x", "-5k", "511", "nan", "inf"):
        with pytest.raises(ConfigError):
            parse_tokens(wrong)
    assert [short(tokens) for tokens in (250_000, 4_000_000, 500)] == ["250k", "4M", "500"]
