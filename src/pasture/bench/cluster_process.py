"""A local cluster as other processes see it: `pasture cluster up` in the background, its commands, its end.

Keeps its files in a folder of its own, so that it is nobody else's cluster, and listens on loopback alone. For benchmarks, the
demo and tests; ends only what it started.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

from pasture.bench.client import Endpoint, Json, call_json
from pasture.core.errors import PastureError

START_SECONDS = 180.0
END_SECONDS = 60.0
POLL_SECONDS = 0.1


class ClusterFailed(PastureError):
    """The cluster, or a command to it, did not do what it should."""


class ClusterProcess:
    """Starts when it is made, and serves then. Raises ClusterFailed with the last lines of its log."""

    def __init__(self, folder: Path, *flags: str, replicas: int = 2, ingresses: int = 2) -> None:
        """`flags`: of `pasture cluster up`, beside the counts."""
        self._key = secrets.token_hex(16)
        self.log = folder / "cluster.log"
        self._environment = os.environ | {"XDG_STATE_HOME": str(folder), "PASTURE_ADMIN_KEY": self._key, "COLUMNS": "200"}
        counts = ("--replicas", str(replicas), "--ingresses", str(ingresses))
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                _command("up", "--port", "0", *counts, *flags),
                env=self._environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self.endpoint = Endpoint.parse(self._url(time.monotonic() + START_SECONDS))
        except BaseException:
            self.close()
            raise
        self.admin = Endpoint.parse(self.endpoint.url, self._key)
        """the same with the key that shows everybody's doing"""

    def run(self, *arguments: str) -> str:
        """What `pasture cluster` with these arguments prints. Raises ClusterFailed."""
        done = subprocess.run(
            _command(*arguments), env=self._environment, capture_output=True, text=True, timeout=START_SECONDS, check=False
        )
        if done.returncode:
            raise ClusterFailed(f"pasture cluster {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    async def told(self) -> Json:
        """What one of the ingresses tells of the cluster. Raises ClusterFailed."""
        found = await call_json(self.admin, "/v1/admin/cluster")
        if found is None:
            raise ClusterFailed("the ingress tells nothing of its cluster")
        return found

    async def replicas(self) -> list[Json]:
        """Those that one of the ingresses is connected to; see `told`."""
        return cast(list[Json], (await self.told())["replicas"])

    async def until(self, check: Callable[[list[Json]], bool], timeout_seconds: float = 60.0) -> list[Json]:
        """Wait until the replicas are such. Raises ClusterFailed."""
        deadline = time.monotonic() + timeout_seconds
        while not check(found := await self.replicas()):
            if time.monotonic() > deadline:
                raise ClusterFailed(f"it never came to that; there are {json.dumps(found)}")
            await asyncio.sleep(POLL_SECONDS)
        return found

    def close(self) -> None:
        """End it, gently first; within END_SECONDS."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _url(self, deadline: float) -> str:
        while time.monotonic() < deadline:
            if found := re.search(r"serves at (http\S+)/v1", self.log.read_text(errors="replace")):
                return found[1]
            if self._process.poll() is not None:
                break
            time.sleep(POLL_SECONDS)
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-5:])
        raise ClusterFailed(f"the cluster did not start:\n{tail}")


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pasture", "cluster", *arguments]
