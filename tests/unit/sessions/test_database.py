from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from pasture.core.errors import ConfigError, ShuttingDown
from pasture.sessions.database import Database
from pasture.sessions.migrations import MIGRATIONS
from pasture.sessions.state import State
from pasture.sessions.values import Counters
from tests.unit.sessions.conftest import check_books, stored_bytes


def test_a_file_that_is_no_database_is_a_matter_of_settings(tmp_path: Path) -> None:
    file = tmp_path / "state.db"
    file.write_bytes(b"this is no database at all" * 100)
    with pytest.raises(ConfigError, match="cannot be used"):
        Database(str(file))
    with pytest.raises(ConfigError, match="cannot be written"):
        Database("/proc/nowhere/state.db")
    with pytest.raises(ConfigError, match="neither a file"):
        Database("mysql://somewhere/state")
    with pytest.raises(ConfigError, match="not a database URL"):
        Database("://")


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgres+psycopg"])
def test_a_server_that_is_not_there_is_a_matter_of_settings(scheme: str) -> None:
    with pytest.raises(ConfigError, match=r"state in postgresql\+psycopg://pasture:\*\*\*@127.0.0.1:1/state cannot be used"):
        Database(f"{scheme}://pasture:secret@127.0.0.1:1/state")


def test_what_a_newer_version_wrote_is_left_alone(tmp_path: Path) -> None:
    file = str(tmp_path / "state.db")
    database = Database(file)
    with database.write() as connection:
        connection.execute(text("INSERT INTO migrations VALUES (999)"))
    database.close()
    with pytest.raises(ConfigError, match="newer"):
        Database(file)


def test_what_an_older_version_wrote_is_taken_along(shared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as older:
        older.setattr("pasture.sessions.database.MIGRATIONS", MIGRATIONS[:3])
        database = Database(shared)
        with database.write() as connection:
            for session_id, context in (("sess_a", '{"tools": [1]}'), ("sess_b", "{}")):
                values = {"id": session_id, "context": context, "metadata": '{"k": 1}'}
                connection.execute(
                    text(
                        "INSERT INTO sessions VALUES (:id, 'default', NULL, NULL, 0, 0, 1, 1, 0, NULL, 0, :context, "
                        ":metadata, 0, 0, 0, 0, 0)"
                    ),
                    values,
                )
        database.close()
    state = State(shared)
    tenant = state.open_tenant
    found = [state.sessions.open(tenant, session_id)[0] for session_id in ("sess_a", "sess_b")]
    assert [(session.context, session.metadata) for session in found] == [({"tools": [1]}, {"k": 1}), ({}, {"k": 1})]
    check_books(state)
    state.sessions.advance(tenant, "sess_a", [], n_tokens=0, used=Counters(), context={"tools": [1]})
    check_books(state)
    for session in found:
        state.sessions.delete(tenant, session.session_id)
    assert stored_bytes(state) == 0
    state.close()


def test_closing_waits_for_who_reads_and_ends_what_comes_later() -> None:
    database = Database()
    entered, leave, order = threading.Event(), threading.Event(), []

    def read() -> None:
        with database.read() as connection:
            entered.set()
            leave.wait(10)
            order.append(connection.execute(text("SELECT 'read'")).scalar_one())

    def close() -> None:
        database.close()
        order.append("closed")

    threads = [threading.Thread(target=read), threading.Thread(target=close)]
    threads[0].start()
    entered.wait(10)
    threads[1].start()
    leave.set()
    for thread in threads:
        thread.join(10)
    assert order == ["read", "closed"]
    with pytest.raises(ShuttingDown), database.read():
        pass


@pytest.fixture
def shared(location: str | None, tmp_path: Path) -> str:
    """Of a new state that several processes can open."""
    return location or str(tmp_path / "state.db")


def test_two_processes_open_a_new_state_at_once_and_many_threads_write_to_it(shared: str) -> None:
    with ThreadPoolExecutor(2) as pool:
        states = list(pool.map(State, [shared, shared]))
    failed: list[BaseException] = []

    def work(state: State, name: str) -> None:
        try:
            for i in range(20):
                state.tenants.add_key(f"{name}-{i % 3}")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(states[i % 2], f"t{i}")) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(states[0].tenants.all_keys()) == len(states[1].tenants.all_keys()) == 80
    for state in states:
        state.close()


def test_two_processes_count_one_session_s_tokens_and_lose_none(shared: str) -> None:
    states = [State(shared) for _ in range(2)]
    tenant = states[0].tenants.create("acme")
    made = states[0].sessions.create(tenant, [{"role": "user", "content": "a"}])
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

    def advance(number: int) -> None:
        states[number % 2].sessions.advance(tenant, made.session_id, said, n_tokens=2, used=Counters(1, 10, 4, 3))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(advance, range(40)))
    assert states[1].sessions.get(tenant, made.session_id).counters == Counters(40, 400, 160, 120)
    for state in states:
        state.close()


def test_who_reads_sees_one_moment(shared: str) -> None:
    reading, writing = State(shared), State(shared)
    n_tenants = text("SELECT count(*) FROM tenants")
    with reading.database.read() as connection:
        before = connection.execute(n_tenants).scalar_one()
        writing.tenants.create("acme")
        assert connection.execute(n_tenants).scalar_one() == before
    with reading.database.read() as connection:
        assert connection.execute(n_tenants).scalar_one() == before + 1
    reading.close()
    writing.close()


def test_an_error_does_not_tell_what_people_wrote(state: State) -> None:
    with pytest.raises(SQLAlchemyError) as caught, state.database.write() as connection:
        connection.execute(text("INSERT INTO nowhere VALUES (:said)"), {"said": "a secret"})
    assert "secret" not in str(caught.value)
