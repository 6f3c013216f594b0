"""One block as the index of a cache directory knows it, and the SQL that belongs to it.

Values that come out of the database are checked, because its file may have been changed by anybody who could also change a
block's. Totals are kept by triggers. Functions on a connection; transactions are the caller's.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from pasture.core.storage import BLOCK_TOKENS
from pasture.core.values import Form
from pasture.tiers.keys import KEY_BYTES

EVICT_ROWS = 64
"""looked at in one go"""
TICK_SECONDS = 2.0
"""times of use are kept this coarsely: within a tick a path needs to be touched once only, and its end is evicted first"""

SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE blocks (
    name BLOB PRIMARY KEY, parent BLOB NOT NULL, p0 INTEGER NOT NULL, p1 INTEGER NOT NULL, form TEXT NOT NULL,
    whole INTEGER NOT NULL, sealed INTEGER NOT NULL, n_bytes INTEGER NOT NULL, tokens BLOB,
    written REAL NOT NULL, last_used REAL NOT NULL, hits INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX by_age ON blocks (last_used, p1);
CREATE INDEX by_parent ON blocks (parent);
CREATE TABLE totals (form TEXT PRIMARY KEY, n_blocks INTEGER NOT NULL, n_bytes INTEGER NOT NULL);
CREATE TRIGGER count_in AFTER INSERT ON blocks BEGIN
    INSERT INTO totals VALUES (new.form, 1, new.n_bytes)
    ON CONFLICT (form) DO UPDATE SET n_blocks = n_blocks + 1, n_bytes = n_bytes + excluded.n_bytes;
END;
CREATE TRIGGER count_out AFTER DELETE ON blocks BEGIN
    UPDATE totals SET n_blocks = n_blocks - 1, n_bytes = n_bytes - old.n_bytes WHERE form = old.form;
END;
"""
COLUMNS = "name, parent, p0, p1, form, whole, sealed, n_bytes, tokens, written, last_used, hits"
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

    @property
    def used(self) -> float:
        """When it was last used, as far as that is known; seconds since the epoch."""
        return max(self.written, self.last_used)


def insert_row(db: sqlite3.Connection, row: Row) -> None:
    db.execute(
        f"INSERT OR REPLACE INTO blocks ({COLUMNS}) VALUES ({','.join('?' * 12)})",
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


def evict_rows(db: sqlite3.Connection, target_bytes: int, used_before: float | None) -> Iterator[Row]:
    left = db.execute("SELECT coalesce(sum(n_bytes), 0) FROM totals").fetchone()[0]
    question = f"SELECT {COLUMNS} FROM blocks WHERE last_used < ? ORDER BY last_used, p1 DESC LIMIT ?"
    while left > target_bytes:
        found = db.execute(question, (float("inf") if used_before is None else used_before, EVICT_ROWS)).fetchall()
        if not found:
            return
        for values in found:
            if left <= target_bytes:
                return
            db.execute("DELETE FROM blocks WHERE name = ?", values[:1])
            if (row := row_of(values)) is not None:
                left -= row.n_bytes
                yield row


def rows_of(found: Iterable[tuple[object, ...]]) -> list[Row]:
    return [row for values in found if (row := row_of(values)) is not None]


def row_of(values: tuple[object, ...]) -> Row | None:
    """None for values that we would never have written: they may have been changed in the file."""
    name, parent, p0, p1, form, whole, sealed, n_bytes, tokens, written, last_used, hits = values
    if not (isinstance(name, bytes) and len(name) == KEY_BYTES and isinstance(parent, bytes) and len(parent) == KEY_BYTES):
        return None
    if not (isinstance(p0, int) and isinstance(p1, int) and isinstance(n_bytes, int) and isinstance(hits, int)):
        return None
    if not (isinstance(written, float) and isinstance(last_used, float) and isinstance(tokens, bytes | None)):
        return None
    if not 0 <= p0 < p1 <= p0 + BLOCK_TOKENS or n_bytes < 0 or form not in FORMS:
        return None
    return Row(name, parent, p0, p1, FORMS[str(form)], bool(whole), bool(sealed), n_bytes, tokens, written, last_used, hits)
