from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import psutil
import pytest

from pasture.bench.client import Endpoint
from pasture.bench.options import BenchOptions
from pasture.bench.systems import Size, System, SystemFailed, find_llama_server, free_port, running, variants
from pasture.core.errors import ConfigError

COPY = Path("copy.gguf")
"""of the model: what a pasture would compute with"""
SIZE = Size(users=16, longest_tokens=1300, cells=32768)
MODEL = Path("model.gguf")

_SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "2"); self.end_headers(); self.wfile.write(b"{}")
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def values(command: tuple[str, ...], flag: str) -> str:
    """The last one: Python's own `-m` comes before ours."""
    return command[len(command) - command[::-1].index(flag)]


def test_every_system_gets_the_same_model_cells_and_threads(tmp_path: Path) -> None:
    binary = tmp_path / "llama-server"
    binary.touch(mode=0o755)
    options = BenchOptions(model=MODEL, threads=2, llama_server=binary)
    for peer in ("pasture", "isolated", "llama-server"):
        for system in variants(peer, SIZE, options, loaded=COPY):
            model = "copy.gguf" if peer == "isolated" else "model.gguf"
            assert [values(system.command, flag) for flag in ("-m", "-c", "-t")] == [model, "32768", "2"]
            assert values(system.command, "--port") == str(system.endpoint.port)


def test_peers_may_get_another_file(tmp_path: Path) -> None:
    binary = tmp_path / "llama-server"
    binary.touch(mode=0o755)
    options = BenchOptions(model=MODEL, peer_model=Path("other.gguf"), llama_server=binary)
    used = {
        peer: values(variants(peer, SIZE, options, loaded=COPY)[0].command, "-m")
        for peer in ("pasture", "isolated", "llama-server")
    }
    assert used == {"pasture": "model.gguf", "isolated": "other.gguf", "llama-server": "other.gguf"}


def test_llama_server_runs_in_both_layouts_with_slots_that_hold_a_conversation(tmp_path: Path) -> None:
    binary = tmp_path / "llama-server"
    binary.touch(mode=0o755)
    options = BenchOptions(model=MODEL, llama_server=binary)
    unified, streams = variants("llama-server", Size(users=64, longest_tokens=1300, cells=32768), options)
    assert "--kv-unified" in unified.command
    assert values(unified.command, "-np") == "64"
    assert "--no-kv-unified" in streams.command
    assert values(streams.command, "-np") == "25"


def test_peers_are_repacked_only_where_that_works(tmp_path: Path) -> None:
    binary = tmp_path / "llama-server"
    binary.touch(mode=0o755)
    options = BenchOptions(model=MODEL, llama_server=binary)
    assert "--no-repack" in variants("llama-server", SIZE, options)[0].command
    assert "--no-repack" not in variants("llama-server", SIZE, options, repack=True)[0].command
    assert "--repack" in variants("isolated", SIZE, options, repack=True)[0].command


def test_flags_for_pasture_are_passed_on() -> None:
    (system,) = variants("pasture", SIZE, BenchOptions(model=MODEL, serve_flags=("--kv-layout", "streams")))
    assert values(system.command, "--kv-layout") == "streams"


def test_a_url_starts_nothing() -> None:
    (system,) = variants("http://box:1234/v1", SIZE, BenchOptions(api_key="key"))
    assert system.command == ()
    assert system.endpoint == Endpoint("box", 1234, api_key="key")


def test_a_missing_llama_server_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("PASTURE_LLAMA_SERVER", raising=False)
    with pytest.raises(ConfigError, match="PASTURE_LLAMA_SERVER"):
        find_llama_server(BenchOptions())
    with pytest.raises(ConfigError, match="not a program"):
        find_llama_server(BenchOptions(llama_server=tmp_path / "nothing"))


def test_llama_server_is_found_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "server"
    binary.touch(mode=0o755)
    monkeypatch.setenv("PASTURE_LLAMA_SERVER", str(binary))
    assert find_llama_server(BenchOptions()) == binary


async def test_a_system_is_watched_while_it_runs_and_gone_afterwards(tmp_path: Path) -> None:
    port = free_port()
    system = System("stub", "", (sys.executable, "-c", _SERVER, str(port)), Endpoint("127.0.0.1", port))
    async with running(system, tmp_path / "logs" / "stub.log") as up:
        assert up.pid is not None
        assert up.memory is not None
        assert await up.memory.sample() > 2**20
        assert psutil.pid_exists(up.pid)
    assert not psutil.pid_exists(up.pid)


async def test_a_system_is_ended_when_its_user_is_cancelled(tmp_path: Path) -> None:
    port = free_port()
    system = System("stub", "", (sys.executable, "-c", _SERVER, str(port)), Endpoint("127.0.0.1", port))
    started: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()

    async def use() -> None:
        async with running(system, tmp_path / "stub.log") as up:
            started.set_result(up.pid)
            await asyncio.Event().wait()

    task = asyncio.create_task(use())
    pid = await started
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert pid is not None
    assert not psutil.pid_exists(pid)


async def test_a_system_that_dies_tells_its_last_words(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "import sys; print('no such model'); sys.exit(3)")
    system = System("stub", "", command, Endpoint("127.0.0.1", free_port()))
    with pytest.raises(SystemFailed, match=r"status 3[\s\S]*no such model"):
        async with running(system, tmp_path / "stub.log"):
            pytest.fail("it never came up")


async def test_a_url_where_nobody_answers_is_told() -> None:
    with pytest.raises(SystemFailed, match="nothing answers"):
        async with running(System("http://x", "", (), Endpoint("127.0.0.1", 9)), Path(os.devnull)):
            pytest.fail("nobody is there")
