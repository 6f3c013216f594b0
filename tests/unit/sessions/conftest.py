"""States in memory and in PostgreSQL, with clocks that tests set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from sqlalchemy import text

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
