"""What is in a cache directory, in SQLite: found by name, by parent and by age, and counted to the byte.

The files are the truth and this is their table of contents. It is opened by any number of processes at once (write-ahead
log); where it is missing, damaged or cannot be opened it is made anew from the files, in memory if need be: then it does not
know what others write, and gives way to one in the directory as soon as that takes one (tried ever less often). A damaged one
is never replaced under its name, which another process may have open: each index carries a generation in its name, the highest
one counts, the others are unlinked, and who has such a one open moves on with the next call. It is not flushed to the device
(a crash of the machine may cost the index, which is then made anew).

A parent is always used at least as recently as its children (`touch` and `add` see to it), so that evicting by age, deepest
first, never leaves a block behind that nothing leads to. Totals are kept by triggers. Any thread, one at a time. Raises
`IndexUnavailable` when SQLite cannot be used now (busy, disk full).
"""

from __future__ import annotations

import os
import re
import secrets
import sqlite3
import stat
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from time import monotonic, time
from typing import Any, TypeVar

from pasture.core.values import Form
from pasture.tiers.disk_rows import (
    COLUMNS,
    FORMS,
    SCHEMA,
    SCHEMA_VERSION,
    TOUCHED,
    Guaranteed,
    Row,
    bytes_by_owner,
    evict_rows,
    evict_rows_of,
    expire_rows,
    insert_row,
    rows_of,
    touch_paths,
    with_paths_used,
)
from pasture.tiers.trouble import Circuit

T = TypeVar("T")

BUSY_SECONDS = 2.0
"""how long to wait for another process's write"""
NAMES_IN_ONE_QUESTION = 500

_REBUILD_CODES = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_MISMATCH}
"""what SQLite says of a file that is none of its own, or not the one we wrote"""
_LATER_CODES = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
"""no reason to make a new index"""
_NO_LIMIT = -1
"""in SQLite's LIMIT"""
_DRAFT = "writing-index-"
_INDEX_FILE = re.compile(r"index-(\d{12})\.sqlite")


class IndexUnavailable(Exception):
    """The index cannot be used now; the message is SQLite's. Never leaves the tiers."""


class DiskIndex:
    """The table of contents of the directory `root`. `clock` is monotonic, in seconds."""

    def __init__(
        self, root: Path, contents: Callable[[Collection[bytes]], Iterable[Row]], clock: Callable[[], float] = monotonic
    ) -> None:
        """`contents` reads from the files what has none of these names, and does not raise."""
        self._root = root
        self._contents = contents
        self._directory = Circuit(clock)
        """whether it may take an index, while that is in memory"""
        self._lock = Lock()
        self._file: Path | None = None
        self._identity: tuple[int, int] | None = None
        self._connection: sqlite3.Connection | None = None

    # Questions

    def stored(self, names: Sequence[bytes]) -> set[bytes]:
        """Those of these names that are stored."""
        found: set[bytes] = set()
        for start in range(0, len(names), NAMES_IN_ONE_QUESTION):
            part = names[start : start + NAMES_IN_ONE_QUESTION]
            rows = self._ask(f"SELECT name FROM blocks WHERE name IN ({','.join('?' * len(part))})", *part)
            found.update(name for (name,) in rows)
        return found

    def children(self, parent: bytes, limit: int) -> list[Row]:
        """Blocks right behind `parent`, last used first."""
        where = "WHERE parent = ? AND tokens IS NOT NULL ORDER BY last_used DESC, written DESC"
        question = f"SELECT {COLUMNS} FROM blocks {where} LIMIT ?"
        return rows_of(self._ask(question, parent, limit))

    def rows(self, limit: int | None = None, *, leaves: bool = False) -> list[Row]:
        """What is stored, last used first; with `leaves`, only blocks that nothing is stored behind."""
        where = "WHERE NOT EXISTS (SELECT 1 FROM blocks child WHERE child.parent = blocks.name)" if leaves else ""
        question = f"SELECT {COLUMNS} FROM blocks {where} ORDER BY last_used DESC, p1 DESC LIMIT ?"
        return rows_of(self._ask(question, _NO_LIMIT if limit is None else limit))

    def path_bytes(self, name: bytes) -> int:
        """Bytes of a block and everything before it."""
        question = """
            WITH RECURSIVE path (name, parent, n_bytes) AS (
                SELECT name, parent, n_bytes FROM blocks WHERE name = ?
                UNION SELECT b.name, b.parent, b.n_bytes FROM blocks b JOIN path ON b.name = path.parent
            ) SELECT coalesce(sum(n_bytes), 0) FROM path"""
        [[n_bytes]] = self._ask(question, name)
        return int(n_bytes)

    def totals(self) -> Mapping[Form, tuple[int, int]]:
        """Blocks and bytes, by form."""
        found = self._ask("SELECT form, n_blocks, n_bytes FROM totals WHERE n_blocks > 0")
        return {FORMS[form]: (n_blocks, n_bytes) for form, n_blocks, n_bytes in found if form in FORMS}

    def bytes_by_owner(self) -> Mapping[bytes, int]:
        """What is on whose account."""
        return self._do(bytes_by_owner)

    def _ask(self, question: str, *values: bytes | int) -> list[tuple[Any, ...]]:
        return self._do(lambda db: db.execute(question, values).fetchall())

    # Changes

    def add(self, row: Row) -> None:
        """Enter a block, and note that its path is in use."""

        self._change(lambda db: _add(db, row))

    def touch(self, hits: Mapping[bytes, int], now: float) -> None:
        """These were used, so many times each; everything before them counts as used too."""
        self._change(lambda db: touch_paths(db, hits, now))

    def drop(self, names: Iterable[bytes]) -> None:
        """Strike out what is not there any more."""
        self._change(lambda db: db.executemany("DELETE FROM blocks WHERE name = ?", [(name,) for name in names]))

    def evict(self, target_bytes: int, *, guaranteed: Guaranteed = lambda owner: 0) -> list[Row]:
        """Strike out least recently used blocks, deepest first, until at most `target_bytes` are left; the caller deletes them.

        What an owner is guaranteed stays while somebody else holds more.
        """
        return self._change(lambda db: list(evict_rows(db, target_bytes, guaranteed)))

    def expire(self, used_before: float, own: Mapping[bytes, float]) -> list[Row]:
        """Strike out what was not used since `used_before` (seconds since the epoch); the caller deletes it.

        `own`: the same of owners that have a time of their own.
        """
        return self._change(lambda db: list(expire_rows(db, used_before, own)))

    def evict_owner(self, owner: bytes, target_bytes: int) -> list[Row]:
        """The same until at most `target_bytes` are left on this owner's account."""
        return self._change(lambda db: list(evict_rows_of(db, owner, target_bytes)))

    def sizes(self) -> Mapping[bytes, int]:
        """Bytes of every block's file, by name: what `reconcile` compares with."""
        return self._do(_names_and_sizes)

    def reconcile(
        self, known: Mapping[bytes, int], files: Mapping[bytes, int], read: Callable[[bytes], Row | None]
    ) -> tuple[int, int]:
        """Make the index agree with the files there are (name -> bytes); (blocks added, blocks struck out).

        `known`: `sizes` from before the files were listed; what other processes have entered since then stays. `read` makes a
        row of a file the index does not know; None where it is no block.
        """
        gone = [name for name, n_bytes in known.items() if files.get(name) != n_bytes]
        new = [row for name, n_bytes in files.items() if known.get(name) != n_bytes and (row := read(name)) is not None]

        def work(db: sqlite3.Connection) -> None:
            db.executemany("DELETE FROM blocks WHERE name = ?", [(name,) for name in gone])
            for row in new:
                _add(db, row)
            db.execute("DELETE FROM totals")
            db.execute("INSERT INTO totals SELECT form, count(*), sum(n_bytes) FROM blocks GROUP BY form")
            db.execute("DELETE FROM owners")
            db.execute("INSERT INTO owners SELECT owner, sum(n_bytes) FROM blocks GROUP BY owner")

        self._change(work)
        return len(new), len(gone)

    def rebuild(self) -> None:
        """Make a new index from the files and let everybody move on to it."""
        with self._lock:
            self._close()
            self._connection = self._made_or_in_memory()

    @property
    def file(self) -> Path | None:
        """Where the index is; None while it is in memory, or closed."""
        return self._file

    def close(self) -> None:
        """Safe to call twice; a later call opens the index again."""
        with self._lock:
            self._close()

    # The file

    def _change(self, work: Callable[[sqlite3.Connection], T]) -> T:
        return self._do(lambda db: _in_transaction(db, work))

    def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` on the newest index; once more on one made from the files, should this one turn out damaged."""
        with self._lock:
            try:
                try:
                    return work(self._current())
                except (sqlite3.Error, OverflowError) as error:
                    if not _is_damage(error):
                        raise
                    replaced = _identity(self._file) != self._identity
                    self._close()
                    self._connection = self._open() if replaced else self._made_or_in_memory()
                    return work(self._connection)
            except (sqlite3.Error, OverflowError) as error:
                raise IndexUnavailable(str(error)) from None

    def _current(self) -> sqlite3.Connection:
        """The open connection, unless another process has replaced the file behind it, or the directory takes one by now."""
        if self._connection is None or _identity(self._file) != self._identity:
            self._close()
            self._connection = self._open()
        elif self._file is None and self._directory.allows:
            self._leave_memory()
        return self._connection

    def _close(self) -> None:
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
        self._connection = None

    def _open(self) -> sqlite3.Connection:
        return self._newest() or self._made_or_in_memory()

    def _newest(self) -> sqlite3.Connection | None:
        """The newest index there is; None where that is no use. Raises sqlite3.Error where it is only busy."""
        if existing := _generations(self._root):
            try:
                return self._opened(_path_of(self._root, existing[-1]))
            except OSError:
                pass  # a link, or gone again
            except sqlite3.Error as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF in _LATER_CODES:
                    raise
        return None

    def _opened(self, file: Path) -> sqlite3.Connection:
        """A connection to an index that is there, whole, and can be written. Raises OSError, sqlite3.Error."""
        identity = _identity(file)
        if identity is None:
            raise FileNotFoundError(f"{file} is not a file")
        connection = sqlite3.connect(
            f"{file.as_uri()}?mode=rw", uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute("PRAGMA synchronous = OFF")
            [version] = connection.execute("PRAGMA user_version").fetchone()
            [verdict] = connection.execute("PRAGMA quick_check(1)").fetchone()
            if version != SCHEMA_VERSION or verdict != "ok":
                raise sqlite3.DatabaseError(f"an index of version {version}, and {verdict}")
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
            connection.execute(TOUCHED)
        except BaseException:
            connection.close()
            raise
        self._file, self._identity = file, identity
        return connection

    def _made_or_in_memory(self) -> sqlite3.Connection:
        """A new index from the files. In memory, where the directory takes no new files."""
        with suppress(sqlite3.Error, OSError):
            return self._made()
        self._directory.failed()
        self._file, self._identity = None, None
        connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self._fill(connection)
        connection.execute(TOUCHED)
        return connection

    def _leave_memory(self) -> None:
        """Move on to an index in the directory if there can be one; files that it does not know are entered."""
        try:
            connection = self._newest() or self._made()
        except (sqlite3.Error, OSError):
            self._directory.failed()
            return
        try:
            _enter(connection, with_paths_used(self._contents(_names_and_sizes(connection))))
        except (sqlite3.Error, OverflowError):
            connection.close()
            self._file, self._identity = None, None
            self._directory.failed()
            return
        self._close()
        self._connection = connection
        self._directory.succeeded()

    def _made(self) -> sqlite3.Connection:
        """A new generation from the files; the older ones go. Raises OSError, sqlite3.Error."""
        existing = _generations(self._root)
        draft = self._root / f"{_DRAFT}{secrets.token_hex(8)}"
        try:
            os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            connection = sqlite3.connect(draft, isolation_level=None)
            try:
                connection.execute("PRAGMA synchronous = OFF")
                self._fill(connection)
                connection.execute("PRAGMA journal_mode = WAL")
            finally:
                connection.close()
            _publish(draft, _path_of(self._root, existing[-1] + 1 if existing else int(time())))
        finally:
            _unlink(draft)
        *older, newest = _generations(self._root)  # perhaps another process's, which has made one at the same time
        for generation in older:
            _unlink(_path_of(self._root, generation))
        return self._opened(_path_of(self._root, newest))

    def _fill(self, connection: sqlite3.Connection) -> None:
        connection.executescript(SCHEMA)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("BEGIN")
        for row in with_paths_used(self._contents(())):
            insert_row(connection, row)
        connection.execute("COMMIT")


def _in_transaction(db: sqlite3.Connection, work: Callable[[sqlite3.Connection], T]) -> T:
    """All of `work`, or nothing of it."""
    db.execute("BEGIN IMMEDIATE")
    try:
        result = work(db)
        db.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise
    return result


def _enter(db: sqlite3.Connection, rows: Iterable[Row]) -> None:
    def work(db: sqlite3.Connection) -> None:
        for row in rows:
            _add(db, row)

    _in_transaction(db, work)


def _add(db: sqlite3.Connection, row: Row) -> None:
    insert_row(db, row)
    touch_paths(db, {row.name: 0}, row.last_used)


def _path_of(root: Path, generation: int) -> Path:
    return root / f"index-{generation:012d}.sqlite"


def _generations(root: Path) -> list[int]:
    """The indexes there are, oldest first."""
    try:
        names = os.listdir(root)
    except OSError:
        return []
    return sorted(int(match[1]) for name in names if (match := _INDEX_FILE.fullmatch(name)))


def _identity(file: Path | None) -> tuple[int, int] | None:
    """Device and inode of a regular file; None where there is none (an index in memory has none)."""
    if file is None:
        return None
    try:
        facts = os.lstat(file)
    except OSError:
        return None
    return (facts.st_dev, facts.st_ino) if stat.S_ISREG(facts.st_mode) else None


def _publish(draft: Path, file: Path) -> None:
    """Give the draft its name, unless another process was faster with its own."""
    try:
        os.link(draft, file)
    except FileExistsError:
        return
    except OSError:
        os.replace(draft, file)  # a file system without hard links


def _unlink(database: Path) -> None:
    for suffix in ("", "-wal", "-shm", "-journal"):
        with suppress(OSError):
            os.unlink(f"{database}{suffix}")


def _is_damage(error: Exception) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        return isinstance(error, (OverflowError, sqlite3.OperationalError))  # values that we would never have written
    return code & 0xFF in _REBUILD_CODES


def _names_and_sizes(db: sqlite3.Connection) -> dict[bytes, int]:
    return dict(db.execute("SELECT name, n_bytes FROM blocks"))
