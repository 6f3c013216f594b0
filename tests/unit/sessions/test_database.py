from __future__ import annotations

import threading
from pathlib import Path

import pytest
from sqlalchemy import text

from pasture.core.errors import ConfigError, ShuttingDown
from pasture.sessions.database import Database
from pasture.sessions.state import State


def test_a_file_that_is_no_database_is_a_matter_of_settings(tmp_path: Path) -> None:
    file = tmp_path / "state.db"
    file.write_bytes(b"this is no database at all" * 100)
    with pytest.raises(ConfigError, match="cannot be used"):
        Database(str(file))
    with pytest.raises(ConfigError, match="cannot be written"):
        Database("/proc/nowhere/state.db")
    with pytest.raises(ConfigError):
        Database("nonsense://")


def test_what_a_newer_version_wrote_is_left_alone(tmp_path: Path) -> None:
    file = str(tmp_path / "state.db")
    database = Database(file)
    with database.write() as connection:
        connection.execute(text("INSERT INTO migrations VALUES (999)"))
    database.close()
    with pytest.raises(ConfigError, match="newer"):
        Database(file)


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


def test_two_processes_and_many_threads_write_to_one_file(tmp_path: Path) -> None:
    states = [State(str(tmp_path / "state.db")) for _ in range(2)]
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
