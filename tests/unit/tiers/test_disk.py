"""The disk tier: what it keeps, in which order it lets go, and what a failing disk is to it."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import xxhash

from pasture.core.errors import ConfigError
from pasture.core.storage import BlockKey
from pasture.core.values import Form
from pasture.tiers import disk_index
from pasture.tiers.disk import DiskTier
from pasture.tiers.disk_files import TEMPORARY, BlockFiles, FileFacts
from pasture.tiers.keys import child_key
from pasture.tiers.wire import CHECKED_BYTES, HEADER_BYTES
from tests.blocks import block_at, blocks, conversation, leading, path, root, same

BLOCK_BYTES = 1000 + 144 + 256
"""of the file of a full block with 1,000 bytes of payload"""


class Time:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.seconds = 1_000_000.0

    def __call__(self) -> float:
        return self.seconds

    def pass_(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture
def clock() -> Time:
    return Time()


Open = Callable[..., DiskTier]


@pytest.fixture
def open_tier(tmp_path: Path, clock: Time) -> Iterator[Open]:
    with ExitStack() as all_opened:

        def opened(budget_bytes: int = 1 << 20) -> DiskTier:
            return all_opened.enter_context(closing(DiskTier(tmp_path / "cache", budget_bytes, clock=clock, now=clock)))

        yield opened


def close(*tiers: DiskTier) -> None:
    for tier in tiers:
        tier.close()


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.kv"))


def fill(tier: DiskTier, *seeds: int, n_tokens: int = 200, clock: Time | None = None) -> None:
    for seed in seeds:
        for block in blocks(conversation(seed, n_tokens)):
            tier.put(block)
        if clock is not None:
            clock.pass_(60)


def kept(tier: DiskTier, seed: int, n_tokens: int = 200) -> int:
    """Leading blocks of a conversation that are stored, and come back right."""
    tokens = conversation(seed, n_tokens)
    n_blocks = leading(tier, path(tokens))
    for block in list(blocks(tokens))[:n_blocks]:
        assert same(tier.get(block.address), block)
    return n_blocks


def test_what_was_put_is_there_after_a_restart(open_tier: Open) -> None:
    tier = open_tier()
    fill(tier, 1, 2)
    tier.close()
    tier = open_tier()
    assert (kept(tier, 1), kept(tier, 2), kept(tier, 3)) == (4, 4, 0)
    figures = tier.statistics()
    assert (figures.blocks, figures.hit_tokens, figures.missed_tokens, figures.damaged_blocks) == (8, 400, 200, 0)
    assert figures.bytes == figures.bytes_by_form[Form.RAW] == figures.read_bytes
    assert figures.latency_seconds > 0
    assert figures.bytes_per_second > 0


def test_leading_stops_at_the_first_that_is_missing(open_tier: Open) -> None:
    tier = open_tier()
    tokens = conversation(1, 2000)
    addresses = path(tokens)
    for index in (0, 1, 2, 5):
        tier.put(block_at(addresses[index], tokens))
    assert leading(tier, addresses) == 3
    assert leading(tier, []) == 0
    assert leading(tier, addresses * 40) == 3, "more than fit into one question"


def test_following_finds_blocks_and_checkpoints_last_used_first(open_tier: Open, clock: Time) -> None:
    tier = open_tier()
    tokens = conversation(1, 128)
    full, second = path(tokens)
    tier.put(block_at(full, tokens))
    tier.put(block_at(second, tokens))
    assert list(tier.following([full.key])[0]) == [(second, tokens[64:])], "a prompt may part from it midway"
    for n_tokens in (70, 80, 90):
        clock.pass_(1)
        tier.put(block_at(path(tokens[:n_tokens])[1], tokens))
    assert [len(found) for _, found in tier.following([full.key])[0]] == [26, 16, 6, 64]
    other = conversation(2, 64)
    tier.put(block_at(path(other)[0], other, whole=True))
    assert (path(other)[0], other) in list(tier.following([root()])[0]), (
        "a checkpoint on a boundary is filed as the block it ends in"
    )
    for n_tokens in range(100, 120):
        tier.put(block_at(path(tokens[:n_tokens])[1], tokens))
    assert len(tier.following([full.key])[0]) == 8, "a few at most"


def test_equal_blocks_exist_once(open_tier: Open, tmp_path: Path) -> None:
    tier = open_tier()
    fill(tier, 1, 1, 1)
    assert tier.statistics().blocks == len(files(tmp_path)) == 4
    assert tier.statistics().written_bytes == sum(file.stat().st_size for file in files(tmp_path))


def test_a_block_whose_file_was_deleted_is_a_miss_and_can_be_put_again(open_tier: Open, tmp_path: Path) -> None:
    tier = open_tier()
    fill(tier, 1)
    for file in files(tmp_path):
        file.unlink()
    assert tier.get(path(conversation(1, 200))[0]) is None
    assert tier.statistics().blocks == 3
    fill(tier, 1)
    assert kept(tier, 1) == 4
    assert tier.statistics().errors == tier.statistics().damaged_blocks == 0


def test_a_block_that_is_entered_again_is_counted_once(open_tier: Open, tmp_path: Path) -> None:
    tier = open_tier()
    fill(tier, 1)
    before, accounts = tier.statistics(), tier.bytes_by_owner()
    for file in files(tmp_path):
        file.unlink()  # and the rows stay, as they do when a neighbour enters the same block in the same moment
    fill(tier, 1)
    after = tier.statistics()
    assert (after.blocks, after.bytes, tier.bytes_by_owner()) == (before.blocks, before.bytes, accounts)
    assert kept(tier, 1) == len(files(tmp_path)) == 4


def test_remove(open_tier: Open, tmp_path: Path) -> None:
    tier = open_tier()
    fill(tier, 1)
    tier.remove(path(conversation(1, 200))[3].key)
    tier.remove(BlockKey(bytes(32)))
    assert kept(tier, 1) == 3
    assert len(files(tmp_path)) == tier.statistics().blocks == 3


def test_least_recently_used_goes_first_and_ends_before_beginnings(open_tier: Open, tmp_path: Path, clock: Time) -> None:
    tier = open_tier(10 * BLOCK_BYTES)
    fill(tier, 1, 2, 3, n_tokens=192, clock=clock)
    assert kept(tier, 1, 192) == 3, "and used again"
    clock.pass_(60)
    fill(tier, 4, n_tokens=192, clock=clock)
    assert [kept(tier, seed, 192) for seed in (1, 2, 3, 4)] == [3, 1, 3, 3]
    assert len(files(tmp_path)) == tier.statistics().blocks == 10
    assert tier.statistics().evicted_blocks == 2


def test_a_parent_outlives_its_children(open_tier: Open, clock: Time) -> None:
    tier = open_tier(12 * BLOCK_BYTES)
    shared = conversation(1, 128)
    for seed in range(10, 30):
        tokens = shared + conversation(seed, 64)
        for block in list(blocks(tokens))[0 if seed == 10 else 2 :]:
            tier.put(block)
        clock.pass_(60)
    assert leading(tier, path(shared + conversation(29, 64))) == 3, "a child that is put keeps its path"
    assert tier.statistics().bytes <= 12 * BLOCK_BYTES


def test_the_budget_holds_at_start_and_for_a_block_that_exceeds_it(open_tier: Open, tmp_path: Path) -> None:
    tier = open_tier()
    fill(tier, 1, 2, 3)
    tier.close()
    tier = open_tier(5 * BLOCK_BYTES)
    assert tier.statistics().bytes <= 5 * BLOCK_BYTES
    tokens = conversation(9, 64)
    tier.put(block_at(path(tokens)[0], tokens, 6 * BLOCK_BYTES))
    assert kept(tier, 9, 64) == 0
    assert tier.statistics().blocks > 0, "nothing was evicted for what does not fit anyway"
    assert sum(file.stat().st_size for file in files(tmp_path)) == tier.statistics().bytes


def test_two_tiers_share_blocks_and_budget(open_tier: Open, tmp_path: Path, clock: Time) -> None:
    one, two = open_tier(20 * BLOCK_BYTES), open_tier(20 * BLOCK_BYTES)
    for seed in range(1, 21, 2):
        fill(one, seed, n_tokens=128, clock=clock)
        fill(two, seed + 1, n_tokens=128, clock=clock)
        assert kept(one, seed + 1, 128) == kept(two, seed, 128) == 2
    assert one.statistics().bytes == two.statistics().bytes <= 20 * BLOCK_BYTES
    assert sum(file.stat().st_size for file in files(tmp_path)) == one.statistics().bytes


def test_what_a_neighbour_writes_while_a_server_starts_stays(
    open_tier: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    neighbour = open_tier()
    fill(neighbour, 1)
    scan = BlockFiles.scan

    def scan_and_be_overtaken(self: BlockFiles) -> Iterator[FileFacts]:
        found = list(scan(self))
        fill(neighbour, 2)
        yield from found

    monkeypatch.setattr(BlockFiles, "scan", scan_and_be_overtaken)
    tier = open_tier()
    monkeypatch.undo()
    assert (kept(tier, 1), kept(tier, 2)) == (4, 4)
    assert tier.statistics().blocks == len(files(tmp_path)) == 8


def test_everything_is_private(open_tier: Open, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        tier = open_tier()
        fill(tier, 1)
        tier.statistics()
        found = list((tmp_path / "cache").rglob("*"))
        assert len(found) > 8
        for item in (tmp_path / "cache", *found):
            assert stat.S_IMODE(item.stat().st_mode) == (0o700 if item.is_dir() else 0o600), item
        tier.close()
    finally:
        os.umask(before)


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_directory_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(ConfigError, match="written by others"):
        DiskTier(tmp_path, 1 << 20)


def test_a_directory_of_someone_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(ConfigError, match="another user"):
        DiskTier(tmp_path, 1 << 20)


def test_a_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(ConfigError, match="cannot be used"):
        DiskTier(tmp_path / "cache", 1 << 20)


def test_abandoned_temporary_files_are_swept_and_young_ones_are_not(open_tier: Open, tmp_path: Path, clock: Time) -> None:
    tier = open_tier()
    fill(tier, 1)
    tier.close()
    folder = files(tmp_path)[0].parent
    for name, age in (("old", 1000), ("young", 10)):
        (folder / f"{TEMPORARY}{name}").touch()
        os.utime(folder / f"{TEMPORARY}{name}", (clock() - age, clock() - age))
    open_tier()
    assert [file.name for file in folder.glob(f"{TEMPORARY}*")] == [f"{TEMPORARY}young"]


class Failing:
    """os.write, until it fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, code: int, after_calls: int = 0) -> None:
        self.broken = True
        self.calls = 0
        real = getattr(os, name)

        def call(*arguments: object, **options: object) -> object:
            self.calls += 1
            if self.broken and self.calls > after_calls:
                raise OSError(code, os.strerror(code))
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize(
    ("name", "code"), [("write", errno.ENOSPC), ("write", errno.EIO), ("replace", errno.EROFS), ("open", errno.EMFILE)]
)
def test_a_disk_that_takes_nothing_costs_writes_and_one_warning(
    open_tier: Open,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    clock: Time,
    name: str,
    code: int,
) -> None:
    tier = open_tier()
    fill(tier, 1)
    failing = Failing(monkeypatch, name, code, after_calls=1 if name == "write" else 0)
    fill(tier, 2, 3)
    assert failing.calls <= 2, "left alone after the first failure"
    assert len(caplog.records) == 1
    assert "cannot be written" in caplog.text
    assert not list((tmp_path / "cache").rglob(f"{TEMPORARY}*")), "nothing half written stays"
    failing.broken = False
    assert kept(tier, 1) == 4, "reading goes on"
    fill(tier, 2)
    assert kept(tier, 2) == 0, "the pause is not over"
    clock.pass_(3)
    fill(tier, 2)
    assert kept(tier, 2) == 4
    assert tier.statistics().errors == 1


def test_a_disk_that_cannot_be_read_is_a_miss_and_keeps_its_files(
    open_tier: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, clock: Time
) -> None:
    tier = open_tier()
    fill(tier, 1, 2, 3)
    failing = Failing(monkeypatch, "readv", errno.EIO)
    addresses = [address for seed in (3, 2, 1) for address in path(conversation(seed, 200))]
    for n_calls in (3, 4, 5):
        assert [tier.get(address) for address in addresses] == [None] * 12
        assert failing.calls == n_calls, "left alone after a few files in a row"
        assert leading(tier, path(conversation(1, 200))) == 0, "no promise while it fails"
        clock.pass_(60)
    assert len(files(tmp_path)) == 10, "the first that failed could have been damaged themselves"
    assert {record.getMessage().split(":")[0] for record in caplog.records} == {
        "a file in the disk cache was damaged and is dropped",
        "the disk cache cannot be read and is left alone for a while",
    }
    failing.broken = False
    clock.pass_(3)
    assert (kept(tier, 1), kept(tier, 2)) == (4, 4)
    assert (tier.statistics().damaged_blocks, tier.statistics().errors) == (2, 3)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_one_file_that_cannot_be_read_is_damaged_and_can_be_put_again(
    open_tier: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    tier = open_tier()
    addresses = path(conversation(1, 200))
    for _ in range(3):  # one bad sector after the other, and never two in a row
        fill(tier, 1)
        failing = Failing(monkeypatch, "open", code)
        assert tier.get(addresses[0]) is None
        failing.broken = False
        assert all(tier.get(address) for address in addresses[1:]), "the disk itself is well"
    fill(tier, 1)
    assert kept(tier, 1) == 4
    assert (tier.statistics().damaged_blocks, tier.statistics().errors) == (3, 0)
    assert len(caplog.records) == 1


def test_too_many_open_files_damage_nothing(open_tier: Open, monkeypatch: pytest.MonkeyPatch, clock: Time) -> None:
    tier = open_tier()
    fill(tier, 1)
    failing = Failing(monkeypatch, "open", errno.EMFILE)
    assert tier.get(path(conversation(1, 200))[0]) is None
    assert failing.calls == 1
    failing.broken = False
    clock.pass_(3)
    assert kept(tier, 1) == 4


def test_a_directory_that_cannot_be_written_is_read(
    open_tier: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tier = open_tier()
    fill(tier, 1)
    tier.close()
    for index in (tmp_path / "cache").rglob("index*"):
        index.unlink()
    for name in ("mkdir", "link", "replace", "unlink"):
        Failing(monkeypatch, name, errno.EROFS)
    real = os.open

    def read_only(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", read_only)
    tier = open_tier()
    assert kept(tier, 1) == 4, "from an index in memory"
    fill(tier, 2)
    assert kept(tier, 2) == 0
    tier.close()
    assert len(caplog.records) == 1


def test_what_a_file_holds_instead_is_never_served(open_tier: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tier = open_tier()
    fill(tier, 1, 2)
    one, two = (path(conversation(seed, 200)) for seed in (1, 2))
    place = {file.stem: file for file in files(tmp_path)}
    swapped = place[one[0].key.hex()], place[two[0].key.hex()]
    content = [file.read_bytes() for file in swapped]
    swapped[0].write_bytes(content[1])
    swapped[1].write_bytes(content[0])
    assert tier.get(one[0]) is tier.get(two[0]) is None
    assert tier.statistics().damaged_blocks == 2
    assert len(caplog.records) == 1
    assert not any(file.exists() for file in swapped)
    fill(tier, 1, 2)
    assert kept(tier, 1) == kept(tier, 2) == 4


def test_links_are_not_followed(open_tier: Open, tmp_path: Path) -> None:
    tier = open_tier()
    fill(tier, 1)
    tokens = conversation(1, 200)
    place = {file.stem: file for file in files(tmp_path)}
    outside = tmp_path / "outside"
    outside.mkdir()
    first, second = (place[address.key.hex()] for address in path(tokens)[:2])
    first.rename(outside / "target")
    first.symlink_to(outside / "target")
    second.parent.rename(outside / "folder")
    second.parent.symlink_to(outside / "folder")
    assert tier.get(path(tokens)[0]) is tier.get(path(tokens)[1]) is None
    fill(tier, 1)
    assert kept(tier, 1) == 4
    assert (outside / "target").exists()
    assert (outside / "folder" / second.name).exists(), "nothing outside is touched"
    assert not first.is_symlink()
    assert not second.parent.is_symlink()


def test_keys_of_other_tokens_find_nothing(open_tier: Open) -> None:
    tier = open_tier()
    fill(tier, 1)
    assert leading(tier, path(conversation(1, 200), namespace="another")) == 0
    assert list(tier.following([child_key(root(), conversation(2, 64))])[0]) == []


def test_files_survive_what_the_index_does_not(open_tier: Open, tmp_path: Path) -> None:
    tier = open_tier()
    fill(tier, 1)
    tier.close()
    for index in (tmp_path / "cache").rglob("index*"):
        index.write_bytes(b"garbage" * 1000)
    tier = open_tier()
    assert kept(tier, 1) == 4
    assert [len(tokens) for _, tokens in tier.following([path(conversation(1, 200))[2].key])[0]] == [8]
    assert len(list((tmp_path / "cache").rglob("index*.sqlite"))) == 1


FOREIGN_ROWS = {
    "no table": "DROP TABLE blocks",
    "foreign rows": "UPDATE blocks SET p0 = 'x', p1 = 1e300, form = x'00', n_bytes = 'many', tokens = 1, last_used = 'y'",
    "no text": "UPDATE blocks SET form = CAST(x'ff' AS TEXT)",
    "no totals": "UPDATE totals SET n_bytes = 1 << 62, form = CAST(x'ff' AS TEXT)",
}
OTHER_DAMAGE = ("deleted", "replaced", "truncated", "scribbled over", "a directory", "a link")


@pytest.mark.parametrize("damage", [*FOREIGN_ROWS, *OTHER_DAMAGE])
def test_an_index_that_is_damaged_while_it_is_open_is_made_anew(open_tier: Open, tmp_path: Path, damage: str) -> None:
    tier, other = open_tier(), open_tier()
    fill(tier, 1)
    [index] = (tmp_path / "cache").rglob("index*.sqlite")
    if damage in FOREIGN_ROWS:
        with closing(sqlite3.connect(index)) as connection:
            connection.execute(FOREIGN_ROWS[damage])
            connection.commit()
    elif damage == "truncated":
        with closing(sqlite3.connect(index)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        os.truncate(index, 8192)
    elif damage == "scribbled over":
        close(tier, other)
        content = bytearray(index.read_bytes())
        content[4096:] = os.urandom(len(content) - 4096)
        index.write_bytes(content)
    else:
        index.unlink()
        if damage == "replaced":
            index.write_bytes(b"x" * 100_000)
        elif damage == "a directory":
            index.mkdir()
        elif damage == "a link":
            index.symlink_to("/dev/zero")
    for _ in range(2):
        for one in (tier, other):
            one.statistics()
            one.following([path(conversation(1, 200))[2].key])
            fill(one, 1, 2)
    assert kept(tier, 1) == kept(other, 1) == kept(tier, 2) == kept(other, 2) == 4
    close(tier, other)
    tier = open_tier()
    assert kept(tier, 1) == kept(tier, 2) == 4
    assert tier.statistics().bytes == sum(file.stat().st_size for file in files(tmp_path))


def test_a_block_without_a_row_is_found_after_a_restart(open_tier: Open, tmp_path: Path) -> None:
    tier = open_tier()
    fill(tier, 1)
    away = tmp_path / "away"
    orphan = files(tmp_path)[0]
    orphan.rename(away)
    tier.close()
    open_tier().close()
    away.rename(orphan)
    tier = open_tier()
    assert kept(tier, 1) == 4
    assert tier.statistics().bytes == sum(file.stat().st_size for file in files(tmp_path))


def test_probing_leaves_no_file(tmp_path: Path) -> None:
    block_files = BlockFiles(tmp_path)
    block_files.create()
    speed = block_files.probe()
    assert speed.latency_seconds > 0
    assert speed.bytes_per_second > 0
    assert not list(block_files.root.iterdir())


@pytest.mark.parametrize("faster_by_seconds", [-1, 0, 1])
def test_two_that_make_an_index_at_once_end_up_with_one(
    open_tier: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faster_by_seconds: int
) -> None:
    tier = open_tier()
    fill(tier, 1)
    tier.close()
    for index in (tmp_path / "cache").rglob("index*"):
        index.unlink()
    seconds = [2000.0 + faster_by_seconds, 2000.0]
    faster: list[DiskTier] = []
    monkeypatch.setattr(disk_index, "time", lambda: seconds[0] if len(faster) == 0 else seconds[1])
    publish = disk_index._publish

    def publish_second(draft: Path, file: Path) -> None:
        if not faster:
            monkeypatch.setattr(disk_index, "_publish", publish)
            faster.append(open_tier())
        publish(draft, file)

    monkeypatch.setattr(disk_index, "_publish", publish_second)
    tier = open_tier()
    assert len(list((tmp_path / "cache").rglob("index*.sqlite"))) == 1
    fill(tier, 2)
    assert kept(faster[0], 1) == kept(faster[0], 2) == 4
    fill(faster[0], 3)
    assert kept(tier, 3) == 4


def test_a_path_stays_together_in_an_index_made_from_files(open_tier: Open, tmp_path: Path, clock: Time) -> None:
    tier = open_tier()
    fill(tier, 1, n_tokens=192)
    tier.close()
    for index in (tmp_path / "cache").rglob("index*"):
        index.unlink()
    place = {file.stem: file for file in files(tmp_path)}
    for age, address in zip((900, 100, 500), path(conversation(1, 192)), strict=True):  # written again after damage
        os.utime(place[address.key.hex()], (clock() - age, clock() - age))
    tier = open_tier(2 * BLOCK_BYTES)
    assert kept(tier, 1, 192) == 1, "its end went, although its beginning is the oldest file"


def test_a_busy_index_costs_a_write_and_nothing_else(
    open_tier: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, clock: Time
) -> None:
    monkeypatch.setattr(disk_index, "BUSY_SECONDS", 0.0)
    tier = open_tier()
    fill(tier, 1)
    [index] = (tmp_path / "cache").rglob("index*.sqlite")
    with closing(sqlite3.connect(index, isolation_level=None)) as hog:
        hog.execute("BEGIN IMMEDIATE")
        fill(tier, 2)
        assert len(files(tmp_path)) == 4, "no file that the index does not count"
        assert kept(tier, 1) == 4
        clock.pass_(10)
        assert kept(tier, 1) == 4, "though its use cannot be noted"
    clock.pass_(100)
    fill(tier, 2)
    assert kept(tier, 2) == 4
    assert [index] == list((tmp_path / "cache").rglob("index*.sqlite")), "busy is no damage"
    assert len(caplog.records) == 1


def test_an_index_in_memory_gives_way_to_one_that_all_share(
    open_tier: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Time
) -> None:
    def full(draft: Path, file: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as while_full:
        while_full.setattr(disk_index, "_publish", full)
        one, two = open_tier(20 * BLOCK_BYTES), open_tier(20 * BLOCK_BYTES)
        fill(one, 1, 2, 3)
        fill(two, 4, 5, 6)
        assert kept(one, 4) == kept(two, 1) == 0
        clock.pass_(3)
        fill(one, 7)
        assert not list((tmp_path / "cache").rglob("*.sqlite"))
    fill(one, 8)
    assert not list((tmp_path / "cache").rglob("*.sqlite")), "not tried at every call"
    clock.pass_(5)
    assert (kept(one, 8), kept(two, 8)) == (4, 4)
    assert (kept(one, 4), kept(two, 1)) == (4, 4)
    fill(two, 9)
    assert one.statistics().bytes == two.statistics().bytes == sum(file.stat().st_size for file in files(tmp_path))
    assert one.statistics().bytes <= 20 * BLOCK_BYTES
    assert len(list((tmp_path / "cache").rglob("index*.sqlite"))) == 1


def test_an_index_that_is_busy_when_it_was_just_made_is_used_later(
    open_tier: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Time
) -> None:
    monkeypatch.setattr(disk_index, "BUSY_SECONDS", 0.0)
    publish = disk_index._publish
    with ExitStack() as neighbour:

        def publish_and_be_overtaken(draft: Path, file: Path) -> None:
            publish(draft, file)
            hog = neighbour.enter_context(closing(sqlite3.connect(file, isolation_level=None)))
            hog.execute("BEGIN IMMEDIATE")

        monkeypatch.setattr(disk_index, "_publish", publish_and_be_overtaken)
        tier = open_tier()
        fill(tier, 1)
        clock.pass_(3)
        fill(tier, 2)
        assert (kept(tier, 1), kept(tier, 2)) == (4, 4), "from an index in memory"
        tier.remove(path(conversation(1, 200))[3].key)
    clock.pass_(5)
    assert (kept(tier, 1), kept(tier, 2)) == (3, 4)
    other = open_tier()
    fill(other, 3)
    assert (kept(other, 1), kept(other, 2), kept(tier, 3)) == (3, 4, 4)


def test_a_block_that_claims_another_position_is_not_served(open_tier: Open, tmp_path: Path) -> None:
    tier = open_tier()
    fill(tier, 1)
    address = path(conversation(1, 200))[1]
    [file] = (file for file in files(tmp_path) if file.stem == address.key.hex())
    content = bytearray(file.read_bytes())
    content[12:20] = struct.pack("<II", 128, 192)
    content[CHECKED_BYTES:HEADER_BYTES] = xxhash.xxh3_128_digest(content[:CHECKED_BYTES] + content[HEADER_BYTES:])
    file.write_bytes(content)
    assert tier.get(address) is None
    assert tier.statistics().damaged_blocks == 1


def test_a_longer_file_is_damaged_too(open_tier: Open, tmp_path: Path) -> None:
    tier = open_tier()
    fill(tier, 1)
    for file in files(tmp_path):
        file.write_bytes(file.read_bytes() + b"x")
    assert [tier.get(address) for address in path(conversation(1, 200))] == [None] * 4


def test_damaged_files_that_no_index_counts_are_removed_at_start(open_tier: Open, tmp_path: Path) -> None:
    tier = open_tier()
    fill(tier, 1)
    tier.close()
    for index in (tmp_path / "cache").rglob("index*"):
        index.unlink()
    victim, *others = files(tmp_path)
    victim.write_bytes(b"GGUF" + victim.read_bytes()[4:])
    open_tier()
    assert files(tmp_path) == others
