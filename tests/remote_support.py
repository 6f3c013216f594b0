"""Remote stores for tests: one in a dictionary that fails as it is told to, and real servers on loopback ports."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from pasture.core.errors import ConfigError
from pasture.core.storage import Bytes
from pasture.tiers.remote import RemoteTier
from pasture.tiers.remote_mooncake import MooncakeShelf, load
from pasture.tiers.remote_ports import Shelf, ShelfFull, Usage
from pasture.tiers.remote_redis import redis_shelf
from pasture.tiers.remote_ring import Ring
from pasture.tiers.remote_server import Server
from pasture.tiers.wire import Wire

LOOPBACK = "127.0.0.1"
PATIENCE_SECONDS = 30.0
"""until a test gives up; nothing is asserted about how long things take on a busy machine"""


def wait_for(condition: Callable[[], object], what: str = "it") -> None:
    """Look again and again until it holds; fails when it does not come to pass."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.01)


class DictShelf:
    """A shelf in memory. `open_door.clear()` makes every call hang, `broken` makes it fail, `full` refuses writes."""

    def __init__(self, address: str = "shelf:1") -> None:
        self.address = address
        self.warnings: tuple[str, ...] = ()
        self.objects: dict[bytes, bytes] = {}
        self.lists: defaultdict[bytes, list[bytes]] = defaultdict(list)
        self.used: list[bytes] = []
        self.calls: list[str] = []
        self.open_door = threading.Event()
        self.open_door.set()
        self.broken = False
        self.full = False
        self.closed = False

    def _enter(self, call: str) -> None:
        self.calls.append(call)
        self.open_door.wait(PATIENCE_SECONDS)
        if self.broken:
            raise ConnectionError("nobody there")

    def open(self) -> None:
        self._enter("open")

    def ping(self) -> None:
        self._enter("ping")

    def usage(self) -> Usage:
        return Usage(len(self.objects), sum(map(len, self.objects.values())), 1 << 30)

    def stored(self, names: Sequence[bytes], before: Sequence[bytes]) -> list[bool]:
        self._enter("stored")
        self.used += [*names, *before]
        return [name in self.objects for name in names]

    def read(self, names: Sequence[bytes]) -> list[Bytes | None]:
        self._enter("read")
        found = [self.objects.get(name) for name in names]
        return [np.frombuffer(data, np.uint8) if data is not None else None for data in found]

    def write(self, name: bytes, head: bytes, payload: Bytes) -> None:
        self._enter("write")
        if self.full:
            raise ShelfFull("no room")
        self.objects[name] = head + payload.tobytes()

    def enlist(self, parent: bytes, head: bytes) -> None:
        self._enter("enlist")
        self.lists[parent].insert(0, head)

    def children(self, parents: Sequence[bytes]) -> list[list[bytes]]:
        self._enter("children")
        return [self.lists[parent][:16] for parent in parents]

    def remove(self, name: bytes) -> None:
        self._enter("remove")
        self.objects.pop(name, None)

    def close(self) -> None:
        self._enter("close")
        self.closed = True


@dataclass
class Fleet:
    """Remote tiers and the processes behind them, ended together."""

    tiers: list[RemoteTier] = field(default_factory=list)
    processes: list[Process] = field(default_factory=list)

    def redis(self, *options: str) -> Process:
        self.processes.append(redis_process(*options))
        return self.processes[-1]

    def mooncake(self) -> Process:
        self.processes.append(mooncake_process())
        return self.processes[-1]

    def tier(
        self,
        *shelves: Shelf,
        replicas: int = 1,
        wire: Wire | None = None,
        list_all: bool = True,
        lookup_seconds: float = 5.0,
    ) -> RemoteTier:
        """A tier over these; asked patiently, because the machine may be busy. Use `connected` where it must be there."""
        ring = Ring([Server(shelf, lookup_seconds=lookup_seconds) for shelf in shelves], replicas)
        tier = RemoteTier(ring, kind="test", transport="tcp", lookup_seconds=lookup_seconds, wire=wire, list_all=list_all)
        self.tiers.append(tier)
        return tier

    def close(self) -> None:
        for process in self.processes:
            process.thaw()
        for tier in self.tiers:
            tier.close()
        for process in self.processes:
            process.kill()


def states(tier: RemoteTier) -> list[str]:
    remote = tier.statistics().remote
    assert remote is not None
    return [server.state for server in remote.servers]


def connected(tier: RemoteTier) -> RemoteTier:
    wait_for(lambda: set(states(tier)) == {"closed"}, "connecting")
    return tier


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        port: int = listener.getsockname()[1]
        return port


class Process:
    """A server as a process of its own, which can be frozen, killed and started again on the same port."""

    def __init__(self, command: Callable[[int], list[str]], *, port: int | None = None) -> None:
        self._command = command
        self.port = port or free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command(self.port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(self._listens, "starting a server")

    def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "the server ended at once"
        with socket.socket() as probe:
            return probe.connect_ex((LOOPBACK, self.port)) == 0

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(PATIENCE_SECONDS)
            self._process = None

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)


def redis_process(*more: str) -> Process:
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed")
    options = ["--bind", LOOPBACK, "--save", "", "--appendonly", "no", *more]
    return Process(lambda port: [binary, "--port", str(port), *options])


def mooncake_master() -> str:
    """The program that is a pool's master; the test is skipped where it is not installed."""
    binary = Path(sys.executable).with_name("mooncake_master")
    if not binary.exists():
        pytest.skip("mooncake_master is not installed")
    try:
        load()
    except ConfigError as error:
        pytest.skip(f"mooncake does not load: {error}")
    return str(binary)


def mooncake_process() -> Process:
    binary, metrics = mooncake_master(), free_port()
    options = [f"-rpc_address={LOOPBACK}", f"-metrics_host={LOOPBACK}", f"-metrics_port={metrics}", "-client_ttl=3"]
    return Process(lambda port: [binary, f"-rpc_port={port}", *options])


def shelf_in_redis(port: int, *, ttl_seconds: float = 3600.0) -> Shelf:
    return redis_shelf([(LOOPBACK, port)], lookup_seconds=5.0, ttl_seconds=ttl_seconds)


def shelf_in_mooncake(port: int, *, share_bytes: int = 64 << 20, protocol: str = "tcp") -> MooncakeShelf:
    return MooncakeShelf((LOOPBACK, port), protocol=protocol, device="", share_bytes=share_bytes, host=LOOPBACK)


class Cable:
    """A stretch of network before a server: `delay_seconds` on the way there, or `cut`, so that nothing arrives any more."""

    def __init__(self, port: int) -> None:
        self.delay_seconds = 0.0
        self.cut = False
        self._target = port
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection((LOOPBACK, self._target))
                self._sockets += [near, far]
                threading.Thread(target=self._pump, args=(near, far, True), daemon=True).start()
                threading.Thread(target=self._pump, args=(far, near, False), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, slow: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if slow:
                    time.sleep(self.delay_seconds)
                if not self.cut:
                    target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)
