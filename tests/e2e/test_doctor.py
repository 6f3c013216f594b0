"""`pasture doctor` has nothing to say about a server on which a healthy `team` has just run."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path

from pasture.bench.client import Endpoint
from pasture.bench.drive import Target, play
from pasture.bench.options import BenchOptions
from pasture.bench.workloads import build
from tests.e2e.test_serve_command import ENVIRONMENT, Server, command


def test_a_healthy_run_has_nothing_wrong(tmp_path: Path) -> None:
    server = Server(tmp_path, "-c", "32768", "--kv-cache", str(tmp_path / "cache"))
    try:
        workload = build(BenchOptions(users=6, turns=3, max_tokens=16))
        exchanges = asyncio.run(play(workload, Target(Endpoint.parse(server.url, None), "default", 30.0)))
        assert [exchange.error for exchange in exchanges] == [None] * workload.n_requests
        told = subprocess.run(
            command("doctor", server.url, "--json"), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=60
        )
    finally:
        server.close()
    names = [finding["name"] for finding in json.loads(told.stdout)["findings"]]
    # what the machine of the test has left is not the run's doing
    assert [name for name in names if name != "memory_pressure"] == []
    assert told.returncode == (3 if names else 0)
