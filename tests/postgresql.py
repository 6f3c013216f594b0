"""A PostgreSQL server for tests, on a socket in a folder of its own; a database for each test that asks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.remote_support import wait_for

USER = "pasture"


class PostgreSQL:
    """Serves until `stop`."""

    def __init__(self) -> None:
        self._binaries = _binaries()
        # root may not run it; and the path of a socket must be short
        self._as: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
        self._folder = Path(tempfile.mkdtemp(prefix="pasture-pg-"))
        if self._as:
            shutil.chown(self._folder, "postgres", "postgres")
        self._numbers = count()
        data = str(self._folder / "data")
        made: list[str | Path] = [
            self._binaries / "initdb",
            "-D",
            data,
            "-U",
            USER,
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--locale=C",
            "--no-sync",
        ]
        subprocess.run(made, check=True, capture_output=True, cwd=self._folder, **self._as)
        serves: list[str | Path] = [self._binaries / "postgres", "-D", data, "-k", str(self._folder), "-h", "", "-F"]
        nowhere = subprocess.DEVNULL
        self._server = subprocess.Popen(serves, cwd=self._folder, stdout=nowhere, stderr=nowhere, **self._as)
        wait_for(lambda: self._sql("SELECT 1").returncode == 0, "starting PostgreSQL")

    def database(self) -> str:
        """The URL of a new one."""
        name = f"state{next(self._numbers)}"
        self._sql(f"CREATE DATABASE {name}").check_returncode()
        return f"postgresql://{USER}@/{name}?host={self._folder}"

    def stop(self) -> None:
        self._server.send_signal(signal.SIGINT)
        self._server.wait(30)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _sql(self, statement: str) -> subprocess.CompletedProcess[bytes]:
        command: list[str | Path] = [
            self._binaries / "psql",
            "-h",
            str(self._folder),
            "-U",
            USER,
            "-d",
            "postgres",
            "-c",
            statement,
        ]
        return subprocess.run(command, check=False, capture_output=True)


@contextmanager
def running() -> Iterator[PostgreSQL]:
    """A server; the test is skipped where PostgreSQL is not installed."""
    server = PostgreSQL()
    try:
        yield server
    finally:
        server.stop()


def _binaries() -> Path:
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not folders or not all((folders[-1] / name).exists() for name in ("initdb", "postgres", "psql")):
        pytest.skip("PostgreSQL is not installed")
    return folders[-1]
