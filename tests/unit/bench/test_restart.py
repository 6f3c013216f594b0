"""The benchmark of restarts: what it starts, whose wait counts, and what it says."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from pasture.bench.client import Chat, Exchange
from pasture.bench.options import BenchOptions
from pasture.bench.restart import ANOTHER, BOTH, COLD, NEXT_TURN, PHASES, SAME, Wait, main, systems, table, wait


def exchange(ttft_seconds: float, prompt_tokens: int, cached_tokens: int) -> Exchange:
    chat = Chat("Ada", (), 4)
    return Exchange(chat, 1.0, 9.0, (1.0 + ttft_seconds,), "", prompt_tokens=prompt_tokens, cached_tokens=cached_tokens)


def test_the_longest_wait_counts() -> None:
    found = wait("pasture", BOTH, [exchange(0.2, 2000, 1990), exchange(0.5, 1900, 1800)])
    assert (found.phase, found.prompt_tokens, found.cached_tokens) == (BOTH, 1900, 1800)
    assert found.ttft_seconds == pytest.approx(0.5)


def test_every_system_has_a_directory_that_survives_it(tmp_path: Path) -> None:
    program = tmp_path / "llama-server"
    program.write_text("")
    program.chmod(0o700)
    options = BenchOptions(model=tmp_path / "m.gguf", llama_server=program, against=("llama-server",), serve_flags=("-x",))
    (ours, cache), *theirs = systems(options, tmp_path / "state", repack=False)
    at = ours.command.index("--kv-cache")
    assert Path(ours.command[at + 1]) == cache
    assert ours.command[at + 2] == "-x", "flags of the caller come behind, and win"
    folders = [cache, *(state for _, state in theirs)]
    assert len(set(folders)) == 3
    assert all(folder.is_dir() and folder.stat().st_mode & 0o077 == 0 for folder in folders)
    assert all(f"{state}/" in system.command for system, state in theirs)
    (cache / "blocks").write_text("an earlier benchmark's")
    systems(options, tmp_path / "state", repack=False)
    assert not list(cache.iterdir())


def test_the_table_compares_with_the_same_systems_cold_start() -> None:
    seconds = {COLD: 6.0, NEXT_TURN: 0.15, SAME: 0.1, ANOTHER: 0.2, BOTH: 0.3}
    waits = [Wait("pasture", phase, seconds[phase], 2000, 1990) for phase in PHASES]
    console = Console(file=io.StringIO(), width=160)
    console.print(table(waits))
    text = str(console.file.getvalue())  # type: ignore[attr-defined]
    for ratio in ("1/40", "1/60", "1/30", "1/20"):
        assert ratio in text


def test_only_what_can_be_restarted_is_compared_with(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(BenchOptions(against=("http://elsewhere:1",))) == 1
    assert "only llama-server" in capsys.readouterr().out
