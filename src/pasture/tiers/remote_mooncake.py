"""A shelf in a Mooncake pool: every node lends memory, blocks move straight from it into ours, by RDMA where there is hardware.

    pasture-1-b-<name>    a block, as the wire writes it
    pasture-1-c-<parent>  heads of what stands behind it, the newest first

Blocks are read into and written from an arena that is registered with the library once, in lanes that one call uses at a time:
the library copies nothing. A block leaves its lane in one copy, because it stays longer than the lane can be spared. An object
that is larger than a lane takes the library's slower way through its own buffers.

What the library does that one would not expect, as measured: `setup` and `close` keep every other Python thread from running,
for many seconds where the master does not answer, so another process tries `setup` first; a frozen master holds a call for half
a minute unless told otherwise; a holder that was killed answers errors until the master has noticed; RDMA without hardware
silently becomes TCP (so we look, and say so). The package is imported when the shelf is opened. Any thread.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from pasture.core.errors import ConfigError
from pasture.core.storage import Bytes
from pasture.tiers.remote_ports import CHILDREN, FORMAT, ShelfFull, Usage
from pasture.tiers.wire import HEADER_BYTES, BadBlock, read_header

DEVICES = Path("/sys/class/infiniband")
N_LANES = 6
"""calls that move blocks at a time"""
LANE_BYTES = 24 << 20
LIBRARY_BYTES = 64 << 20
"""for the library's own buffers"""
CONNECT_SECONDS = 1.0
BEHAVIOUR = {
    "MC_TCP_PROGRESS_TIMEOUT_SEC": "2",
    "MC_TCP_STATUS_TIMEOUT_SEC": "2",
    "MC_RPC_TIMEOUT_MS": "2000",
    "MC_RPC_CONNECT_TIMEOUT_MS": "1000",
    "MC_HANDSHAKE_CONNECT_TIMEOUT": "1",
    "MC_STORE_CLIENT_SETUP_RETRIES": "2",
    "MC_LOG_LEVEL": "ERROR",
    "MC_YLT_LOG_LEVEL": "ERROR",
    "GLOG_minloglevel": "3",
}
"""set before the library is loaded, where the environment does not say otherwise: it gives up soon and keeps quiet"""

TRIAL_SECONDS = 10.0
_TRIAL = """
import os, sys
from mooncake.store import MooncakeDistributedStore
host, transport, device, master = sys.argv[1:]
os._exit(MooncakeDistributedStore().setup(host, "P2PHANDSHAKE", 0, 16 << 20, transport, device, master) and 1)
"""

NO_ROOM = -200
NOT_THERE = -704
RPC_FAILURES = range(-999, -899)
"""the master does not answer; other negative codes are about one object, whose holder may have been killed"""


class MooncakeError(Exception):
    """A code that is neither success nor absence."""


class MooncakeShelf:
    """`host`: where others find this node's memory; None: the address from which the master is reached."""

    def __init__(
        self,
        master: tuple[str, int],
        *,
        protocol: str,
        device: str,
        share_bytes: int,
        host: str | None,
        devices: Path = DEVICES,
    ) -> None:
        self.address = f"{master[0]}:{master[1]}"
        self._master = master
        self._device = device
        self._share_bytes = share_bytes
        self._host = host
        self.warnings: tuple[str, ...] = ()
        self.transport = protocol
        """what is used in fact"""
        if protocol == "rdma" and (reason := missing_rdma(device, devices)) is not None:
            self.transport = "tcp"
            self.warnings = (f"RDMA was asked for, but {reason}: blocks go over TCP",)
        self._store: Any = None
        self._arena: Bytes | None = None
        self._lanes: SimpleQueue[int] = SimpleQueue()

    def open(self) -> None:
        mooncake = load()
        own = _own_address(self._master)
        host, device = self._host or own, self._device if self.transport == "rdma" else ""
        _try_elsewhere(host, self.transport, device, self.address)
        store = mooncake.MooncakeDistributedStore()
        code = store.setup(host, "P2PHANDSHAKE", self._share_bytes, LIBRARY_BYTES, self.transport, device, self.address)
        _check(code, "setup")
        arena = np.empty(N_LANES * LANE_BYTES, np.uint8)
        _check(store.register_buffer(arena.ctypes.data, arena.nbytes), "register_buffer")
        self._store, self._arena = store, arena
        for lane in range(N_LANES):
            self._lanes.put(lane)

    def ping(self) -> None:
        self._exist([_object("ping", b"")])

    def usage(self) -> Usage:
        return Usage(budget_bytes=self._share_bytes)

    def stored(self, names: Sequence[bytes], before: Sequence[bytes]) -> Sequence[bool]:
        return self._exist([_object("b", name) for name in (*names, *before)])[: len(names)]

    def read(self, names: Sequence[bytes]) -> Sequence[Bytes | None]:
        keys = [_object("b", name) for name in names]
        replicas = self._store.batch_get_replica_desc(keys)
        sizes = [_size_of(replicas.get(key, [])) for key in keys]
        found: list[Bytes | None] = [None] * len(keys)
        rest = [index for index, size in enumerate(sizes) if size > 0]
        while rest:
            together, n_bytes = 0, 0
            while together < len(rest) and n_bytes + sizes[rest[together]] <= LANE_BYTES:
                n_bytes += sizes[rest[together]]
                together += 1
            batch, rest = rest[: max(1, together)], rest[max(1, together) :]
            for index, data in zip(batch, self._read([keys[i] for i in batch], [sizes[i] for i in batch]), strict=True):
                found[index] = data
        return found

    def write(self, name: bytes, head: bytes, payload: Bytes) -> None:
        key, n_bytes = _object("b", name), len(head) + payload.nbytes
        if n_bytes > LANE_BYTES:
            _check(self._store.put_parts(key, head, payload), "put_parts")
            return
        with self._lane() as lane:
            lane[: len(head)] = np.frombuffer(head, np.uint8)
            lane[len(head) : n_bytes] = payload
            _check(self._store.put_from(key, lane.ctypes.data, n_bytes), "put_from")

    def enlist(self, parent: bytes, head: bytes) -> None:
        key = _object("c", parent)
        others = [other for other in _heads(self._store.get(key)) if other != head]
        _check(self._store.upsert(key, b"".join([head, *others[: CHILDREN - 1]])), "upsert")

    def children(self, parents: Sequence[bytes]) -> Sequence[Sequence[bytes]]:
        found: list[bytes] = self._store.get_batch([_object("c", parent) for parent in parents])
        return [_heads(value) for value in found]

    def remove(self, name: bytes) -> None:
        code = self._store.remove(_object("b", name), True)
        if code != NOT_THERE:
            _check(code, "remove")

    def close(self) -> None:
        self._store.close()

    # Inside

    def _exist(self, keys: list[str]) -> list[bool]:
        codes: list[int] = self._store.batch_is_exist(keys)
        if codes and min(codes) < 0:
            _check(min(codes), "batch_is_exist")
        return [code == 1 for code in codes]

    def _read(self, keys: list[str], sizes: list[int]) -> list[Bytes | None]:
        if sum(sizes) > LANE_BYTES:
            return [np.frombuffer(value, np.uint8) if value else None for value in self._store.get_batch(keys)]
        with self._lane() as lane:
            starts = [sum(sizes[:index]) for index in range(len(sizes))]
            codes = self._store.batch_get_into(keys, [lane.ctypes.data + start for start in starts], sizes)
            if min(codes) in RPC_FAILURES:
                _check(min(codes), "batch_get_into")
            return [lane[start : start + code].copy() if code > 0 else None for start, code in zip(starts, codes, strict=True)]

    @contextmanager
    def _lane(self) -> Iterator[Bytes]:
        """A part of the arena for one call; waits for one while all are in use."""
        assert self._arena is not None, "the shelf is not open"
        number = self._lanes.get()
        try:
            yield self._arena[number * LANE_BYTES : (number + 1) * LANE_BYTES]
        finally:
            self._lanes.put(number)


def load() -> Any:
    """The library. Raises ConfigError where it cannot be loaded."""
    for name, value in BEHAVIOUR.items():
        os.environ.setdefault(name, value)
    try:
        import mooncake.store  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError(
            f"kv_remote: mooncake:// needs the package mooncake-transfer-engine-non-cuda (pip install 'pasture[mooncake]') "
            f"and libibverbs1 from the system: {error}"
        ) from None
    return mooncake.store


def missing_rdma(device: str, devices: Path = DEVICES) -> str | None:
    """Why RDMA cannot be used here; None where it can."""
    found = sorted(path.name for path in devices.iterdir()) if devices.is_dir() else []
    if not found:
        return "this machine has no RDMA device"
    missing = [name for name in device.split(",") if name and name not in found]
    return f"{missing[0]} is none of this machine's RDMA devices ({', '.join(found)})" if missing else None


def _try_elsewhere(host: str, transport: str, device: str, master: str) -> None:
    """Raises where a process that can be killed does not get through `setup`."""
    command = [sys.executable, "-c", _TRIAL, host, transport, device, master]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=TRIAL_SECONDS)
    except subprocess.TimeoutExpired:
        raise MooncakeError("the master listens and does not answer") from None
    except subprocess.CalledProcessError as error:
        raise MooncakeError(f"the master refuses, or does not answer (setup ended with {error.returncode})") from None


def _own_address(master: tuple[str, int]) -> str:
    """The address from which the master can be reached; raises OSError where it cannot."""
    with socket.create_connection(master, CONNECT_SECONDS) as connection:
        host: str = connection.getsockname()[0]
    return host


def _heads(value: bytes) -> list[bytes]:
    """What `enlist` has put one behind the other."""
    found: list[bytes] = []
    with suppress(BadBlock):
        while value:
            n_bytes = HEADER_BYTES + read_header(value).n_token_bytes
            found.append(value[:n_bytes])
            value = value[n_bytes:]
    return found


def _check(code: int, call: str) -> None:
    if code == NO_ROOM:
        raise ShelfFull("the pool's memory is full")
    if code < 0:
        raise MooncakeError(f"{call} answered {code}")


def _size_of(replicas: Sequence[Any]) -> int:
    """Bytes of an object, by what is known of where it is; 0 where none of it is in anybody's memory."""
    sizes = (r.get_memory_descriptor().buffer_descriptor.size for r in replicas if r.is_memory_replica())
    return next(sizes, 0)


def _object(kind: str, name: bytes) -> str:
    return f"pasture-{FORMAT}-{kind}-{name.hex()}"
