"""What `pasture bench remote` makes of its measurements."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from pasture.bench.remote import Round, ratio, store_command, stores_of, table

ROUND = Round(
    store="redis",
    recomputed_seconds=6.0,
    here_seconds=6.1,
    restored_seconds=0.2,
    prompt_tokens=2000,
    cached_tokens=1999,
    written_bytes=46 << 20,
    gap_nats=0.0,
)


def test_ratios_are_medians_over_prompts_of_one_store() -> None:
    rounds = [ROUND, replace(ROUND, restored_seconds=0.1), replace(ROUND, restored_seconds=0.3)]
    rounds.append(replace(ROUND, store="mooncake", restored_seconds=0.6))
    assert stores_of(rounds) == ["redis", "mooncake"]
    assert ratio(rounds, "redis") == pytest.approx(30)
    assert ratio(rounds, "mooncake") == pytest.approx(10)


def test_the_table_says_what_was_measured_and_how_many_said_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    Console(width=160).print(table([ROUND, replace(ROUND, gap_nats=0.125)]))
    printed = capsys.readouterr().out
    for expected in ("redis", "1/30", "1,999 of 2,000", "46.0 MiB", "1 of 2", "0.12 nats"):
        assert expected in printed


def test_a_store_that_is_not_installed_is_not_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    assert store_command("redis") is None
    assert store_command("mooncake") is None
    (tmp_path / "mooncake_master").touch()
    command = store_command("mooncake")
    assert command is not None
    assert command[0] == str(tmp_path / "mooncake_master")
    assert "-rpc_address=127.0.0.1" in command
