"""One block as the index of a cache directory knows it, and the SQL that belongs to it.

Values that come out of the database are checked, because its file may have been changed by anybody who could also change a
block's. Totals, of all and of each owner, are kept by triggers. Functions on a connection; transactions are the caller's.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pasture.core.storage import BLOCK_TOKENS
from pasture.core.values import Form
from pasture.tiers.keys import KEY_BYTES

EVICT_ROWS = 64
"""looked at in one go"""
TICK_SECONDS = 2.0
"""times of use are kept this coarsely: within a tick a path needs to be touched once only, and its end is evicted first"""

SCHEMA_VERSION = 2
SCHEMA = """
CREATE TABLE blocks (
    name BLOB PRIMARY KEY, parent BLOB NOT NULL, p0 INTEGER NOT NULL, p1 INTEGER NOT NULL, form TEXT NOT NULL,
    whole INTEGER NOT NULL, sealed INTEGER NOT NULL, n_bytes INTEGER NOT NULL, tokens BLOB,
    written REAL NOT NULL, last_used REAL NOT NULL, hits INTEGER NOT NULL, owner BLOB NOT NULL
) WITHOUT ROWID;
CREATE INDEX by_age ON blocks (last_used, p1);
CREATE INDEX by_owner ON blocks (owner, last_used, p1);
CREATE INDEX by_parent ON blocks (parent);
CREATE TABLE totals (form TEXT PRIMARY KEY, n_blocks INTEGER NOT NULL, n_bytes INTEGER NOT NULL);
CREATE TABLE owners (owner BLOB PRIMARY KEY, n_bytes INTEGER NOT NULL);
CREATE TRIGGER count_in AFTER INSERT ON blocks BEGIN
    INSERT INTO totals VALUES (new.form, 1, new.n_bytes)
    ON CONFLICT (form) DO UPDATE SET n_blocks = n_blocks + 1, n_bytes = n_bytes + excluded.n_bytes;
    INSERT INTO owners VALUES (new.owner, new.n_bytes)
    ON CONFLICT (owner) DO UPDATE SET n_bytes = n_bytes + excluded.n_bytes;
END;
CREATE TRIGGER count_out AFTER DELETE ON blocks BEGIN
    UPDATE totals SET n_blocks = n_blocks - 1, n_bytes = n_bytes - old.n_bytes WHERE form = old.form;
    UPDATE owners SET n_bytes = n_bytes - old.n_bytes WHERE owner = old.owner;
END;
"""
COLUMNS = "name, parent, p0, p1, form, whole, sealed, n_bytes, tokens, written, last_used, hits, owner"
TOUCH_PATHS = """
WITH RECURSIVE path (name) AS (
    SELECT name FROM touched
    UNION
    SELECT parent.name FROM path JOIN blocks child ON child.name = path.name JOIN blocks parent ON parent.name = child.parent
    WHERE parent.last_used < :now
)
UPDATE blocks SET last_used = :now WHERE name IN path AND last_used < :now
"""
TOUCHED = "CREATE TEMP TABLE touched (name BLOB PRIMARY KEY, hits INTEGER NOT NULL)"
"""every connection's own"""
Guaranteed = Callable[[bytes], int]
"""owner -> bytes that others cannot push it below"""
FORMS = {form.value: form for form in Form}


@dataclass(frozen=True, slots=True)
class Row:
    """A block as the index knows it, without any secret."""

    name: bytes
    parent: bytes
    p0: int
    p1: int
    form: Form
    whole: bool
    sealed: bool
    n_bytes: int
    """of its file"""
    tokens: bytes | None
    """its tokens section, for `following`: a prompt may part from a block anywhere in it"""
    written: float
    """seconds since the epoch"""
    last_used: float
    """the beginning of a tick"""
    hits: int
    owner: bytes
    """the name of whose account it is on"""

    @property
    def used(self) -> float:
        """When it was last used, as far as that is known; seconds since the epoch."""
        return max(self.written, self.last_used)


def insert_row(db: sqlite3.Connection, row: Row) -> None:
    """Enter a row in place of what there is under its name."""
    db.execute("DELETE FROM blocks WHERE name = ?", (row.name,))  # an INSERT OR REPLACE fires no trigger for what it replaces
    db.execute(
        f"INSERT INTO blocks ({COLUMNS}) VALUES ({','.join('?' * 13)})",
        (
            row.name,
            row.parent,
            row.p0,
            row.p1,
            row.form.value,
            row.whole,
            row.sealed,
            row.n_bytes,
            row.tokens,
            row.written,
            row.last_used,
            row.hits,
            row.owner,
        ),
    )


def tick(seconds: float) -> float:
    """The beginning of the tick that this time is in."""
    return seconds // TICK_SECONDS * TICK_SECONDS


def touch_paths(db: sqlite3.Connection, hits: Mapping[bytes, int], now: float) -> None:
    """These were used, so many times each, and with them everything before them.

    Stops at a block that was used as lately: by the same rule, everything before that was too.
    """
    db.execute("DELETE FROM touched")
    db.executemany("INSERT INTO touched VALUES (?, ?)", hits.items())
    db.execute(TOUCH_PATHS, {"now": tick(now)})
    db.executemany("UPDATE blocks SET hits = hits + ? WHERE name = ?", [(n, name) for name, n in hits.items() if n])


def with_paths_used(rows: Iterable[Row]) -> list[Row]:
    """The same rows, each used as lately as anything behind it."""
    found = {row.name: row for row in rows}
    for name in sorted(found, key=lambda name: found[name].p1, reverse=True):
        row = found[name] = replace(found[name], last_used=tick(found[name].last_used))
        before = found.get(row.parent)
        if before is not None and before.last_used < row.last_used:
            found[row.parent] = replace(before, last_used=row.last_used)
    return list(found.values())


def bytes_by_owner(db: sqlite3.Connection) -> dict[bytes, int]:
    """What is on whose account."""
    return dict(db.execute("SELECT owner, n_bytes FROM owners WHERE n_bytes > 0"))


def expire_rows(db: sqlite3.Connection, used_before: float, own: Mapping[bytes, float]) -> Iterator[Row]:
    """Delete rows that were not used since then, or since their owner's own time."""
    for owner in bytes_by_owner(db):
        while found := _coldest(db, [owner], own.get(owner, used_before)):
            for row in found:
                db.execute("DELETE FROM blocks WHERE name = ?", (row.name,))
                yield row


def evict_rows(db: sqlite3.Connection, target_bytes: int, guaranteed: Guaranteed) -> Iterator[Row]:
    """Delete rows, least recently used first, of owners that hold more than they are guaranteed while there are any."""
    held = bytes_by_owner(db)
    left = sum(held.values())
    while left > target_bytes:
        beyond = [owner for owner, n_bytes in held.items() if n_bytes > guaranteed(owner)]
        found = _coldest(db, beyond or list(held))
        if not found and beyond:
            beyond = []
            found = _coldest(db, list(held))
        if not found:
            return
        for row in found:
            if left <= target_bytes:
                return
            if not beyond or held[row.owner] > guaranteed(row.owner):
                db.execute("DELETE FROM blocks WHERE name = ?", (row.name,))
                held[row.owner] -= row.n_bytes
                left -= row.n_bytes
                yield row


def evict_rows_of(db: sqlite3.Connection, owner: bytes, target_bytes: int) -> Iterator[Row]:
    """The same for what is on one account."""
    left = bytes_by_owner(db).get(owner, 0)
    while left > target_bytes and (found := _coldest(db, [owner])):
        for row in found:
            if left <= target_bytes:
                return
            db.execute("DELETE FROM blocks WHERE name = ?", (row.name,))
            left -= row.n_bytes
            yield row


def _coldest(db: sqlite3.Connection, owners: Sequence[bytes], used_before: float = float("inf")) -> list[Row]:
    """The least recently used rows of these owners, deepest first; rows that make no sense are struck out on the way."""
    question = f"SELECT {COLUMNS} FROM blocks WHERE owner = ? AND last_used < ? ORDER BY last_used, p1 DESC LIMIT ?"
    found: list[Row] = []
    for owner in owners:
        for values in db.execute(question, (owner, used_before, EVICT_ROWS)).fetchall():
            if (row := row_of(values)) is not None:
                found.append(row)
            else:
                db.execute("DELETE FROM blocks WHERE name = ?", values[:1])
    found.sort(key=lambda row: (row.last_used, -row.p1))
    return found[:EVICT_ROWS]


def rows_of(found: Iterable[tuple[object, ...]]) -> list[Row]:
    return [row for values in found if (row := row_of(values)) is not None]


def row_of(values: tuple[object, ...]) -> Row | None:
    """None for values that we would never have written: they may have been changed in the file."""
    name, parent, p0, p1, form, whole, sealed, n_bytes, tokens, written, last_used, hits, owner = values
    if not (isinstance(name, bytes) and len(name) == KEY_BYTES and isinstance(parent, bytes) and len(parent) == KEY_BYTES):
        return None
    if not (isinstance(p0, int) and isinstance(p1, int) and isinstance(n_bytes, int) and isinstance(hits, int)):
        return None
    if not (isinstance(written, float) and isinstance(last_used, float) and isinstance(tokens, bytes | None)):
        return None
    if not (isinstance(owner, bytes) and len(owner) == KEY_BYTES):
        return None
    if not 0 <= p0 < p1 <= p0 + BLOCK_TOKENS or n_bytes < 0 or form not in FORMS:
        return None
    return Row(
        name, parent, p0, p1, FORMS[str(form)], bool(whole), bool(sealed), n_bytes, tokens, written, last_used, hits, owner
    )
