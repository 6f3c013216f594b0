"""`pasture doctor`: what it prints and how it ends, over a log and over a server that is not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pasture.cli.main import main

HEALTHY = {"messages": [{"role": "user", "content": "Hi"}]}
SORTED = {"messages": [{"role": "user", "content": "[red]Hi[/]"}], "tools": [{"name": "a"}, {"name": "b"}]}
TURNED = {**SORTED, "tools": SORTED["tools"][::-1]}


def ended(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["doctor", *arguments])
    return int(end.value.code or 0)


def log_of(folder: Path, *entries: object) -> str:
    file = folder / "requests.jsonl"
    file.write_text("\n".join(json.dumps(entry) for entry in entries))
    return str(file)


def test_a_healthy_log_ends_with_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(log_of(tmp_path, HEALTHY)) == 0
    assert capsys.readouterr().out.startswith("Nothing wrong found in 1 requests")


def test_only_line_ends_end_a_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON lets line separators of other kinds stand in its strings as they are."""
    said = {"messages": [{"role": "user", "content": "one\u2028two\u0085three\u2029"}]}
    file = tmp_path / "requests.jsonl"
    file.write_bytes(b"\r\n".join([json.dumps(said, ensure_ascii=False).encode()] * 2))
    assert ended(str(file)) == 0
    assert capsys.readouterr().out.startswith("Nothing wrong found in 2 requests")


def test_a_fault_ends_with_3_and_says_what_to_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(log_of(tmp_path, SORTED, TURNED)) == 3
    assert "change: sort the tools by name" in capsys.readouterr().out


def test_json_is_for_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(log_of(tmp_path, SORTED, TURNED), "--json") == 3
    told = json.loads(capsys.readouterr().out)
    assert (told["ok"], [finding["name"] for finding in told["findings"]]) == (False, ["tools_in_changing_order"])


@pytest.mark.parametrize(("target", "code"), [("nowhere.jsonl", 2), ("http://127.0.0.1:1", 1)])
def test_what_cannot_be_examined_is_one_line(target: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(target) == code
    assert capsys.readouterr().err.startswith("pasture: ")
