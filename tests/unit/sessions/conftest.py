"""States in memory and in PostgreSQL, with clocks that tests set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from sqlalchemy import event, text

from pasture.sessions.state import State
from tests.postgresql import PostgreSQL, running


@dataclass
class Time:
    """A clock for the tests to move."""

    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Time:
    return Time()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    with running() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def location(request: pytest.FixtureRequest) -> str | None:
    """Of a new state."""
    if request.param == "sqlite":
        return None
    server: PostgreSQL = request.getfixturevalue("postgresql")
    return server.database()


@pytest.fixture
def state(location: str | None, clock: Time) -> Iterator[State]:
    made = State(location, wall_clock=clock, clock=clock)
    yield made
    made.close()


def rows(state: State, table: str) -> int:
    with state.database.read() as connection:
        return int(connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one())


def stored_bytes(state: State) -> int:
    with state.database.read() as connection:
        return int(connection.execute(text("SELECT coalesce(sum(n_bytes), 0) FROM stored")).scalar_one())


def check_books(state: State) -> None:
    """Every turn and context counts who points at it and is pointed at, and every tenant's bytes are what it stores."""
    with state.database.read() as connection:
        turns = connection.execute(text("SELECT turn_id, tenant, parent, messages, n_bytes, refs FROM turns")).all()
        heads = connection.execute(text("SELECT head FROM sessions UNION ALL SELECT head FROM responses")).scalars().all()
        bodies = connection.execute(text("SELECT tenant, body, n_bytes FROM responses")).all()
        sessions = connection.execute(text("SELECT tenant, metadata, context_digest FROM sessions")).all()
        contexts = connection.execute(text("SELECT tenant, digest, body, n_bytes, refs FROM contexts")).all()
        stored = connection.execute(text("SELECT tenant, n_bytes FROM stored WHERE n_bytes <> 0")).all()
    pointed = Counter([*(turn.parent for turn in turns), *heads])
    assert {turn.turn_id: turn.refs for turn in turns} == {turn_id: n for turn_id, n in pointed.items() if turn_id is not None}
    n_bytes: Counter[str] = Counter()
    used = Counter((session.tenant, session.context_digest) for session in sessions if session.context_digest is not None)
    assert {(context.tenant, context.digest): context.refs for context in contexts} == used
    for session in sessions:
        n_bytes[session.tenant] += len(session.metadata.encode())
    written = [(turn, turn.messages) for turn in turns] + [(row, row.body) for row in (*bodies, *contexts)]
    for row, content in written:
        assert row.n_bytes == len(content.encode())
        n_bytes[row.tenant] += row.n_bytes
    assert {row.tenant: row.n_bytes for row in stored} == n_bytes


@contextmanager
def statements(state: State) -> Iterator[list[str]]:
    """What the database is asked within the block; many rows with one statement are one."""
    asked: list[str] = []

    def note(*given: object) -> None:
        asked.append(str(given[2]))

    engine = state.database._engine
    event.listen(engine, "before_cursor_execute", note)
    try:
        yield asked
    finally:
        event.remove(engine, "before_cursor_execute", note)
