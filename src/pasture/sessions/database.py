"""The database of tenants and transcripts: SQLite, or PostgreSQL by URL, reached through SQLAlchemy's Core.

Opening brings the schema up to date: `MIGRATIONS` is only ever appended to, and its statements are SQL that both understand.
Both give the same guarantees: who reads sees one moment, and who writes is alone, in this process by a lock and among processes
by what the database has (SQLite's write lock, an advisory lock in PostgreSQL) and is waited for. So a read in a writing
transaction is still true when it writes. No call here is made on an event loop. Any thread may call.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry, StaticPool

from pasture.core.errors import ConfigError, ShuttingDown
from pasture.sessions.migrations import MIGRATIONS

BUSY_SECONDS = 10.0
"""how long another process' writing is waited for"""
POSTGRESQL = "postgresql"
CONNECT_SECONDS = 10
WRITERS = 0x70617374757265
"""the advisory lock of whoever writes: "pasture" in ASCII"""


class Database:
    """Connections to one database, its schema current."""

    def __init__(self, location: str | None = None) -> None:
        """`location`: a file, a database URL, or None for memory. Raises ConfigError for one that cannot be used."""
        url = _url(location)
        self._engine = _engine(url)
        self._writing: dict[str, object] = {"writes": True}
        if url.get_backend_name() == POSTGRESQL:  # what was committed while this one waited for its turn counts
            self._writing["isolation_level"] = "READ COMMITTED"
        self._lock = threading.RLock()
        self._closed = False
        self._in_memory = url.database == ":memory:"
        self.location = url.render_as_string(hide_password=True)
        try:
            self._migrate()
        except SQLAlchemyError as error:
            self._engine.dispose()
            raise ConfigError(f"the state in {self.location} cannot be used: {reason(error)}") from None

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that changes nothing. Raises ShuttingDown after `close`."""
        if self._in_memory:  # one connection for everybody
            with self._lock, self._open_engine.begin() as connection:
                yield connection
            return
        with self._open_engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction of its own, committed unless the block raises. Raises ShuttingDown after `close`."""
        with self._lock, self._open_engine.connect().execution_options(**self._writing) as connection, connection.begin():
            yield connection

    def close(self) -> None:
        """Waits for who is in a transaction on the one connection of a database in memory, or writes."""
        with self._lock:
            self._closed = True
            self._engine.dispose()

    @property
    def _open_engine(self) -> Engine:
        if self._closed:
            raise ShuttingDown("the server is shutting down")
        return self._engine

    def _migrate(self) -> None:
        with self.write() as connection:
            connection.execute(text("CREATE TABLE IF NOT EXISTS migrations (version INTEGER PRIMARY KEY)"))
            done = connection.execute(text("SELECT max(version) FROM migrations")).scalar() or 0
            if done > len(MIGRATIONS):
                raise ConfigError(f"the state in {self.location} was written by a newer pasture")
            for version, statements in enumerate(MIGRATIONS[done:], start=done + 1):
                for statement in statements:
                    connection.execute(text(statement))
                connection.execute(text("INSERT INTO migrations VALUES (:version)"), {"version": version})


def reason(error: Exception) -> str:
    """What went wrong, in a line; of a database's error without the statement and its values, which hold what was said."""
    return str(getattr(error, "orig", None) or error).partition("\n")[0]


def _url(location: str | None) -> URL:
    if location is None:
        return make_url("sqlite://").set(database=":memory:")
    if "://" in location:
        return _server_url(location)
    path = Path(location).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # transcripts are private to whoever runs the server
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise ConfigError(f"state: {path} cannot be written: {error.strerror or error}") from None
    return make_url("sqlite://").set(database=str(path))


def _server_url(location: str) -> URL:
    try:
        url = make_url(location)
    except ArgumentError:
        raise ConfigError("state: this is not a database URL") from None
    if url.get_backend_name() == "sqlite":
        return url
    if url.get_backend_name() not in (POSTGRESQL, "postgres"):
        raise ConfigError(f"state: {url.drivername} is neither a file, sqlite:// nor postgresql://")
    driver = url.drivername.partition("+")[2] or "psycopg"
    return url.set(drivername=f"{POSTGRESQL}+{driver}")


def _engine(url: URL) -> Engine:
    """Errors leave out parameters: they are what people wrote, and errors are logged."""
    return _postgresql(url) if url.get_backend_name() == POSTGRESQL else _sqlite(url)


def _postgresql(url: URL) -> Engine:
    waits = {"connect_timeout": CONNECT_SECONDS, "options": f"-c lock_timeout={1000 * BUSY_SECONDS:.0f}"}
    try:
        engine = create_engine(
            url, hide_parameters=True, pool_pre_ping=True, isolation_level="REPEATABLE READ", connect_args=waits
        )
    except (ImportError, SQLAlchemyError) as error:
        raise ConfigError(
            f"state: no driver for {url.drivername} (pip install 'pasture[postgresql]' brings psycopg): {error}"
        ) from None

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        if connection.get_execution_options().get("writes"):
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITERS})")

    return engine


def _sqlite(url: URL) -> Engine:
    pool = {"poolclass": StaticPool} if url.database == ":memory:" else {}
    engine = create_engine(
        url, hide_parameters=True, connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False}, **pool
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _: ConnectionPoolEntry) -> None:
        connection.isolation_level = None  # transactions are begun below, not by the driver's guess
        _write_ahead(connection)
        connection.execute("PRAGMA synchronous=NORMAL").close()
        connection.execute("PRAGMA secure_delete=ON").close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # a writer says so at once: one that turns from reading to writing midway may find that it cannot
        connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN")

    return engine


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Where another is opening the same new file, SQLite refuses this at once rather than wait; so we do."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL").close()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)
