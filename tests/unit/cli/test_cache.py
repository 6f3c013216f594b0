"""`pasture cache`: what it says of a directory, and what it takes away."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pasture.tiers import disk_files
from pasture.tiers.disk import DiskTier
from pasture.tiers.disk_files import LAYOUT
from pasture.tiers.sealed import SealedWire
from tests.blocks import blocks, conversation, leading, path
from tests.unit.cli.test_flags import run

BUDGET_BYTES = 1 << 20
SECRET = bytes(range(32))
DOCS = Path(__file__).parents[3] / "docs"


def fill(directory: Path, *seeds: int, secret: bytes | None = None, age_seconds: float = 0.0) -> None:
    """Conversations of three full blocks and a short one."""
    wire = SealedWire(secret) if secret is not None else None
    tier = DiskTier(directory, BUDGET_BYTES, wire=wire, now=lambda: time.time() - age_seconds)
    with closing(tier):
        for seed in seeds:
            for block in blocks(conversation(seed, 200)):
                tier.put(block)


def stored(directory: Path, seed: int) -> int:
    """Leading blocks of a conversation."""
    with closing(DiskTier(directory, BUDGET_BYTES)) as tier:
        return leading(tier, path(conversation(seed, 200)))


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "cache"
    fill(directory, 1, 2, age_seconds=60)
    yield directory
    assert all(not file.stat().st_mode & 0o077 for file in directory.rglob("*.kv")), "still private"


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run("cache", *arguments, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_ls_lists_conversations_last_used_first(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(cache, 3, age_seconds=3600)
    with closing(DiskTier(cache, BUDGET_BYTES)) as tier:
        assert tier.get(path(conversation(1, 200))[3]) is not None
    found = answer(capsys, "ls", str(cache))["conversations"]
    assert [row["tokens"] for row in found] == [200, 200, 200]
    assert found[0]["ends_in"] == path(conversation(1, 200))[3].key.hex()
    assert found[0]["hits"] == 1
    assert found[2]["ends_in"] == path(conversation(3, 200))[3].key.hex()
    assert found[2]["used_seconds_ago"] > 3000
    assert found[0]["bytes"] == sum(file.stat().st_size for file in cache.rglob("*.kv")) // 3
    assert len(answer(capsys, "ls", str(cache), "--limit", "2")["conversations"]) == 2


def test_ls_prints_a_table(cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert run("cache", "ls", str(cache)) == 0
    table = capsys.readouterr().out
    assert path(conversation(1, 200))[3].key.hex()[:12] in table
    assert "raw" in table


def test_stats_counts(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(cache, 1, secret=SECRET)
    found = answer(capsys, "stats", str(cache))
    assert (found["conversations"], found["blocks"], found["encrypted_blocks"]) == (3, 12, 4)
    assert found["bytes"] == found["bytes_by_form"]["raw"] == sum(file.stat().st_size for file in cache.rglob("*.kv"))
    assert run("cache", "stats", str(cache)) == 0
    assert "12, " in capsys.readouterr().out


def test_verify_removes_what_is_damaged(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(cache, 1, secret=SECRET)
    fill(cache, 1, secret=bytes(32))
    key_file = tmp_path / "key"
    key_file.write_bytes(SECRET)
    key_file.chmod(0o600)
    victim = next(file for file in cache.rglob("*.kv") if file.stem == path(conversation(2, 200))[0].key.hex())
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    found = answer(capsys, "verify", str(cache), "--kv-key-file", str(key_file))
    assert list(found["damaged"]) == [victim.stem]
    assert (found["files"], found["not_opened"]) == (16, 4), "those under the other key"
    assert not victim.exists()
    found = answer(capsys, "verify", str(cache))
    assert (found["files"], found["not_opened"], found["damaged"]) == (15, 8, {})
    assert (stored(cache, 1), stored(cache, 2)) == (4, 0)
    assert run("cache", "verify", str(cache)) == 0
    assert "0 damaged" in capsys.readouterr().out


def test_verify_goes_on_after_a_file_that_cannot_be_read(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = path(conversation(1, 200))[0].key.hex()
    real = os.open

    def open_all_but_one(path: str, flags: int, *rest: int) -> int:
        if victim in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", open_all_but_one)
    found = answer(capsys, "verify", str(cache))
    assert (found["files"], found["damaged"], found["unreadable"]) == (8, {}, {victim: "Permission denied"})
    assert run("cache", "verify", str(cache)) == 0
    printed = capsys.readouterr()
    assert printed.err == f"{victim[:12]}: cannot be read (Permission denied); left where it is\n"
    assert "0 damaged and removed, 1 unreadable" in printed.out
    monkeypatch.undo()
    assert stored(cache, 1) == 4


def test_verify_rebuilds_the_index(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [before] = cache.rglob("index-*.sqlite")
    assert answer(capsys, "verify", str(cache), "--rebuild")["rebuilt"]
    [after] = cache.rglob("index-*.sqlite")
    assert after != before
    assert stored(cache, 1) == stored(cache, 2) == 4


def test_prune_to_a_size(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(cache, 3)
    assert run("cache", "prune", str(cache), "--to", "5kB") == 0
    assert "removed" in capsys.readouterr().out
    assert 0 < sum(file.stat().st_size for file in cache.rglob("*.kv")) <= 5000
    assert stored(cache, 3) >= 3, "what was used last stays"


def test_prune_by_age(cache: Path) -> None:
    fill(cache, 3, age_seconds=7200)
    assert run("cache", "prune", str(cache), "--older-than", "1h") == 0
    assert [stored(cache, seed) for seed in (1, 2, 3)] == [4, 4, 0]


def test_clear_asks(cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    assert run("cache", "clear", str(cache)) == 1
    assert stored(cache, 1) == 4
    assert run("cache", "clear", str(cache), "--yes") == 0
    assert "8 blocks removed" in capsys.readouterr().out
    assert not list(cache.rglob("*.kv"))
    assert stored(cache, 1) == 0


def test_the_documents_name_the_directory_of_this_version() -> None:
    assert f"under `DIR/{LAYOUT}/`" in (DOCS / "operations.md").read_text()
    assert f"`DIR/{LAYOUT}/" in (disk_files.__doc__ or "")


@pytest.fixture
def other_version(cache: Path) -> Path:
    """The blocks of the cache as another version would have left them, and something of the user's."""
    left = cache / "v1"
    shutil.copytree(cache / LAYOUT, left)
    (left / "notes").write_text("mine")
    outside = cache.parent / "outside"
    outside.mkdir()
    (outside / f"{'0' * 64}.kv").write_text("mine")
    (left / "00").symlink_to(outside)
    (cache / "v10").symlink_to(outside)
    return left


def test_what_another_version_left_is_told_and_removed(
    cache: Path, other_version: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    n_bytes = sum(file.stat().st_size for file in other_version.rglob("*") if file.is_file() and file.name != "notes")
    for command in ("ls", "stats"):
        assert answer(capsys, command, str(cache))["other_versions"] == {"v1": n_bytes}
        assert run("cache", command, str(cache)) == 0
        assert "of another version of pasture" in capsys.readouterr().out
    assert run("cache", "prune", str(cache), "--to", "1GiB") == 0
    assert list(other_version.rglob("*.kv")), "not unasked"
    capsys.readouterr()
    assert run("cache", "prune", str(cache), "--other-versions") == 0
    assert "0 blocks removed, 0 B\nv1 of another version of pasture removed, " in capsys.readouterr().out
    assert [file.name for file in other_version.iterdir() if not file.is_symlink()] == ["notes"], "nothing foreign is touched"
    assert len(list((cache.parent / "outside").iterdir())) == 1
    assert answer(capsys, "stats", str(cache))["other_versions"] == {}
    assert stored(cache, 1) == stored(cache, 2) == 4


def test_clear_takes_another_version_along_also_where_there_is_nothing_else(cache: Path, other_version: Path) -> None:
    (other_version / "notes").unlink()
    shutil.rmtree(cache / LAYOUT)
    assert run("cache", "clear", str(cache), "--yes") == 0
    assert not list(cache.rglob("*.kv"))


def test_settings_may_name_the_cache(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(cache, 1, secret=SECRET)
    (tmp_path / "key").write_bytes(SECRET)
    (tmp_path / "key").chmod(0o600)
    monkeypatch.setenv("PASTURE_KV_CACHE", str(cache))
    assert answer(capsys, "stats")["blocks"] == 12
    monkeypatch.setenv("PASTURE_KV_KEY_FILE", str(tmp_path / "key"))
    assert answer(capsys, "verify")["not_opened"] == 0


def test_mistakes_are_one_line(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (("ls",), "pasture: which cache? Name its directory, or set PASTURE_KV_CACHE, or kv_cache in pasture.toml\n"),
        (("ls", str(tmp_path)), f"pasture: there is no cache in {tmp_path}\n"),
        (
            ("prune", str(cache)),
            "pasture: say what is to go: --to SIZE, --older-than TIME, --other-versions\n",
        ),
        (("prune", str(cache), "--to", "5G"), "pasture: --to: '5G' is not a size: write 5GiB or 5GB\n"),
    ):
        assert run("cache", *arguments) == 2
        assert capsys.readouterr().err == message
    assert not list(tmp_path.glob("v*")), "looking creates nothing"
