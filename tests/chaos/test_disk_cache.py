"""A disk cache under SIGKILL, under damage of every kind, and under two processes: nothing wrong is served, and it is used.

Every byte of a block follows from its tokens (`tests.blocks`), so whatever comes back is compared with what it should be.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest
import xxhash

from pasture.tiers.block import Block
from pasture.tiers.disk import DiskTier
from pasture.tiers.disk_cache import DiskCache
from pasture.tiers.disk_files import LAYOUT
from pasture.tiers.sealed import SealedWire
from pasture.tiers.wire import CHECKED_BYTES, HEADER_BYTES, PlainWire, Wire
from tests.blocks import blocks, conversation, leading, path, same
from tests.cache_users import share, use, write_until_killed

N_KILLS = int(os.environ.get("CHAOS_KILLS", "200"))
N_DAMAGES = int(os.environ.get("CHAOS_DAMAGES", "1000"))
KILL_BUDGET_BYTES = 8 << 20

context = get_context("forkserver")
context.set_forkserver_preload(["tests.cache_users"])


@pytest.fixture(autouse=True)
def _children_need_no_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every child would import the script that runs the tests, which takes ten times as long as all that it does."""
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)


@pytest.mark.timeout(300)
def test_two_hundred_kills_leave_nothing_wrong(tmp_path: Path) -> None:
    rng = random.Random(5)
    seen = Counter[str]()
    damaged = 0
    for number in range(N_KILLS):
        here, there = context.Pipe()
        writer = context.Process(target=write_until_killed, args=(tmp_path / "cache", KILL_BUDGET_BYTES, number, there))
        writer.start()
        there.close()
        here.recv()
        time.sleep(rng.random() * 0.02)  # the moment of the kill, not a condition
        writer.kill()
        writer.join()
        here.close()
        assert writer.exitcode == -signal.SIGKILL, "it found something wrong itself"
        tier = DiskTier(tmp_path / "cache", KILL_BUDGET_BYTES)
        for _ in range(3):
            seen += use(tier, rng)
        figures = tier.statistics()
        damaged += figures.damaged_blocks + figures.errors
        assert figures.bytes <= KILL_BUDGET_BYTES
        tier.close()
    assert seen["wrong"] == 0
    assert seen["broken"] == 0, "the index promises nothing that is not there"
    assert damaged == 0, "no file is ever seen half written"
    assert seen["hit"] > seen["miss"], "the cache is used"


Damage = Callable[[Path, random.Random, Path], None]
"""of a block's file; the last path is another block's"""


def flip_a_bit(file: Path, rng: random.Random, other: Path) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def cut_short(file: Path, rng: random.Random, other: Path) -> None:
    os.truncate(file, rng.randrange(file.stat().st_size))


def lengthen(file: Path, rng: random.Random, other: Path) -> None:
    with file.open("ab") as stream:
        stream.write(rng.randbytes(rng.randrange(1, 5000)))


def zero_the_end(file: Path, rng: random.Random, other: Path) -> None:
    size = file.stat().st_size
    os.truncate(file, rng.randrange(size))
    os.truncate(file, size)


def put_anothers_content(file: Path, rng: random.Random, other: Path) -> None:
    file.write_bytes(other.read_bytes())


def put_anothers_content_under_this_name(file: Path, rng: random.Random, other: Path) -> None:
    file.write_bytes(checked(bytearray(other.read_bytes()), name=bytes.fromhex(file.stem)))


def put_noise(file: Path, rng: random.Random, other: Path) -> None:
    file.write_bytes(rng.randbytes(rng.randrange(5000)))


def put_a_foreign_file(file: Path, rng: random.Random, other: Path) -> None:
    file.write_bytes(b"GGUF" + bytes(rng.randrange(5000)))


def put_a_directory(file: Path, rng: random.Random, other: Path) -> None:
    file.unlink()
    file.mkdir()


def put_a_fifo(file: Path, rng: random.Random, other: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def put_a_socket(file: Path, rng: random.Random, other: Path) -> None:
    file.unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        before = Path.cwd()
        os.chdir(file.parent)  # a socket's path must be short
        listener.bind(file.name)
        os.chdir(before)


def put_a_link(file: Path, rng: random.Random, other: Path) -> None:
    file.unlink()
    file.symlink_to(rng.choice((str(other), "/dev/zero", "nowhere", file.name)))


def link_the_folder_away(file: Path, rng: random.Random, other: Path) -> None:
    away = file.parents[3] / f"away-{rng.randrange(1 << 60)}"
    file.parent.rename(away)
    file.parent.symlink_to(away)


def declare_a_huge_payload(file: Path, rng: random.Random, other: Path) -> None:
    content = bytearray(file.read_bytes())
    content[24:32] = rng.choice((1 << 31, 1 << 32, 1 << 62, (1 << 64) - 1)).to_bytes(8, "little")
    file.write_bytes(checked(content, name=bytes.fromhex(file.stem)))


def be_huge(file: Path, rng: random.Random, other: Path) -> None:
    declare_a_huge_payload(file, rng, other)
    os.truncate(file, HEADER_BYTES + (1 << 40))


def checked(content: bytearray, name: bytes) -> bytes:
    """With that name, and a checksum that is right."""
    content[32:64] = name
    content[CHECKED_BYTES:HEADER_BYTES] = xxhash.xxh3_128_digest(content[:CHECKED_BYTES] + content[HEADER_BYTES:])
    return bytes(content)


DAMAGES: tuple[Damage, ...] = (
    flip_a_bit,
    cut_short,
    lengthen,
    zero_the_end,
    put_anothers_content,
    put_anothers_content_under_this_name,
    put_noise,
    put_a_foreign_file,
    put_a_directory,
    put_a_fifo,
    put_a_socket,
    put_a_link,
    link_the_folder_away,
    declare_a_huge_payload,
    be_huge,
)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("wire", [PlainWire(), SealedWire(bytes(range(32)))], ids=["plain", "sealed"])
def test_a_thousand_damaged_files_are_misses(tmp_path: Path, wire: Wire, caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(6)
    tier = DiskTier(tmp_path / "cache", 1 << 30, wire=wire)
    tokens = [conversation(seed, 200) for seed in range(8)]
    stored = [block for each in tokens for block in blocks(each)]
    for block in stored:
        tier.put(block)

    def place(block: Block) -> Path:
        name = wire.name(block.address.key).hex()
        return tmp_path / "cache" / LAYOUT / name[:2] / f"{name}.kv"

    for number in range(N_DAMAGES // 2):
        block, other = rng.sample(stored, 2)
        tier.put(block)
        tier.put(other)
        DAMAGES[number % len(DAMAGES)](place(block), rng, place(other))
        if number % 7 == 0:  # found at a start, and not by a request
            tier.close()
            tier = DiskTier(tmp_path / "cache", 1 << 30, wire=wire)
            assert leading(tier, [block.address]) <= 1
        assert tier.get(block.address) is None, DAMAGES[number % len(DAMAGES)].__name__
        for again in (block, other):
            tier.put(again)
            assert same(tier.get(again.address), again), DAMAGES[number % len(DAMAGES)].__name__
    for each in tokens:
        wanted = list(blocks(each))
        leading(tier, path(each))
        assert all(found is None or same(found, block) for block in wanted for found in [tier.get(block.address)])
        assert all(
            found in (each[address.p0 : address.p1] for address in path(each))
            for _, found in tier.following([wanted[-2].address.key])[0]
        )
    assert tier.statistics().errors == 0
    assert len(caplog.records) < N_DAMAGES // 10, "a warning a kind and minute, not one a file"
    tier.close()


def test_verify_takes_every_damaged_file_away(tmp_path: Path) -> None:
    rng = random.Random(7)
    tier = DiskTier(tmp_path / "cache", 1 << 30)
    stored = [block for seed in range(20) for block in blocks(conversation(seed, 200))]
    for block in stored:
        tier.put(block)
    tier.close()
    files = sorted((tmp_path / "cache").rglob("*.kv"))
    hurt = rng.sample(files, 30)
    for number, file in enumerate(hurt):
        DAMAGES[number % 7](file, rng, rng.choice([whole for whole in files if whole not in hurt]))
    cache = DiskCache(tmp_path / "cache")
    damaged = {verdict.name.hex() for verdict in cache.verify(None) if verdict.damage is not None}
    cache.close()
    assert damaged == {file.stem for file in hurt}
    assert sorted((tmp_path / "cache").rglob("*.kv")) == [file for file in files if file not in hurt]


@pytest.mark.parametrize("budget_bytes", [64 << 20, 4 << 20], ids=["room for all", "evicting"])
def test_two_processes_share_a_directory(tmp_path: Path, budget_bytes: int) -> None:
    pipes = [context.Pipe() for _ in range(2)]
    writers = [
        context.Process(target=share, args=(tmp_path / "cache", budget_bytes, seed, 2.5, there))
        for seed, (_, there) in enumerate(pipes)
    ]
    for writer in writers:
        writer.start()
    answers = [here.recv() for here, _ in pipes]
    for writer in writers:
        writer.join()
    for seen in answers:
        assert seen.get("wrong", 0) == seen.get("damaged", 0) == seen.get("errors", 0) == 0
        assert seen["hit"] > 0
    files = list((tmp_path / "cache").rglob("*.kv"))
    largest = max(file.stat().st_size for file in files)
    assert sum(file.stat().st_size for file in files) <= budget_bytes + largest, "what one wrote while the other made room"
    assert len(list((tmp_path / "cache").rglob("index*.sqlite"))) == 1, "both use one index"
    tier = DiskTier(tmp_path / "cache", budget_bytes)
    files = list((tmp_path / "cache").rglob("*.kv"))
    assert tier.statistics().bytes == sum(file.stat().st_size for file in files) <= budget_bytes
    if budget_bytes > 32 << 20:
        written = sum(seen["written_bytes"] for seen in answers)
        assert written < 1.2 * tier.statistics().bytes, "each has read what the other wrote, instead of writing it again"
    assert not list((tmp_path / "cache").rglob("writing-*"))
    tier.close()
