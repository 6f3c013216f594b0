"""How a benchmark answers: where its figures go, and with which exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from pasture.bench.answering import Answer, run_and_answer
from pasture.bench.options import BenchOptions
from pasture.bench.systems import SystemFailed


async def _three(options: BenchOptions, folder: Path, console: Console) -> Answer:
    (folder / "server.log").write_text("started")
    console.print("measuring")
    return Answer({"answer": 3, "seen_in": str(folder)}, ["a table"], 3)


async def _fails(options: BenchOptions, folder: Path, console: Console) -> Answer:
    raise SystemFailed("it does not answer")


async def _interrupted(options: BenchOptions, folder: Path, console: Console) -> Answer:
    raise KeyboardInterrupt


def test_for_people_it_is_a_table_and_nothing_stays(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Path] = []

    async def measure(options: BenchOptions, folder: Path, console: Console) -> Answer:
        seen.append(folder)
        return await _three(options, folder, console)

    assert run_and_answer("three", BenchOptions(), measure) == 3
    assert capsys.readouterr().out == "measuring\na table\n"
    assert not seen[0].exists()


def test_in_a_folder_it_is_json_beside_the_logs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "new"
    assert run_and_answer("three", BenchOptions(out=folder, as_json=True), _three) == 3
    written = (folder / "result.json").read_text()
    printed = capsys.readouterr()
    assert printed.out == written + "\n", "and nothing else on stdout"
    assert "measuring" in printed.err
    assert json.loads(written)["answer"] == 3
    assert {"settings", "machine"} < json.loads(written).keys()
    assert (folder / "server.log").exists()


def test_what_fails_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_and_answer("three", BenchOptions(), _fails) == 1
    assert capsys.readouterr().out == "pasture bench three: it does not answer\n"
    assert run_and_answer("three", BenchOptions(), _interrupted) == 130
