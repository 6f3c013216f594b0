"""States in memory with clocks that tests set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from sqlalchemy import text

from pasture.sessions.state import State


@dataclass
class Time:
    """A clock for the tests to move."""

    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Time:
    return Time()


@pytest.fixture
def state(clock: Time) -> Iterator[State]:
    made = State(wall_clock=clock, clock=clock)
    yield made
    made.close()


def rows(state: State, table: str) -> int:
    with state.database.read() as connection:
        return int(connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one())


def stored_bytes(state: State) -> int:
    with state.database.read() as connection:
        return int(connection.execute(text("SELECT coalesce(sum(n_bytes), 0) FROM stored")).scalar_one())
