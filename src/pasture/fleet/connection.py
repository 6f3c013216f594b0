"""How a command reaches Ray: one that is there, by its address, or one that it starts on this machine and that ends with it.

A local one listens on the loopback network alone, and to those who have the user's token (`~/.ray/auth_token`). Where it is,
and who holds it, is in a small file of the user's, so that other commands find it without being told.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from pasture.core.errors import ConfigError
from pasture.fleet.paths import state_directory

LOCAL = "local"
LOOPBACK = "127.0.0.2"
"""Ray does not start on 127.0.0.1"""
OBJECT_STORE_BYTES = 80 << 20
"""Ray's own store, which carries nothing here"""
LOCAL_CPUS = 64
"""that Ray may count: processes here share the machine, whatever Ray believes"""

AUTHENTICATION = "RAY_AUTH_MODE"


@dataclass(frozen=True, slots=True)
class Held:
    """A local cluster and the process that holds it."""

    address: str
    pid: int


def held() -> Held | None:
    """The local cluster of this user that is up, if there is one."""
    try:
        found = Held(**json.loads(_file().read_text()))
        os.kill(found.pid, 0)
    except (OSError, ValueError, TypeError):
        return None
    return found


@contextmanager
def local_ray() -> Iterator[str]:
    """A Ray of this machine's own for the length of the block; the address others reach it by."""
    if (there := held()) is not None:
        raise ConfigError(f"a local cluster is up already, held by process {there.pid}: `pasture cluster down` ends it")
    ray = _ray()
    ray.init(
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        num_cpus=LOCAL_CPUS,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address=_loopback(),
    )
    try:
        found = Held(ray.get_runtime_context().gcs_address, os.getpid())
        _file().parent.mkdir(parents=True, exist_ok=True)
        _file().write_text(json.dumps({"address": found.address, "pid": found.pid}))
        yield found.address
    finally:
        _file().unlink(missing_ok=True)
        ray.shutdown()


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connected to a Ray that is there: at the address, or the local one that is up. Raises ConfigError where there is none."""
    there = held() if address in (None, LOCAL) else None
    wanted = there.address if there is not None else address or "auto"
    if address == LOCAL and there is None:
        raise ConfigError("no local cluster is up: `pasture cluster up` starts one")
    here = None
    if there is not None:
        here = _loopback()
        os.environ.setdefault(AUTHENTICATION, "token")  # which Ray turns on by itself for what it starts locally
    ray = _ray()
    try:
        ray.init(address=wanted, log_to_driver=False, logging_level=logging.ERROR, _node_ip_address=here)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"Ray cannot be reached at {wanted}: {reason}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _ray() -> ModuleType:
    """Ray, which reads the environment when it is imported; what it tells of every step goes to its own log files."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    return ray


def _loopback() -> str | None:
    """A loopback address that Ray accepts; None where the system has one only."""
    return LOOPBACK if sys.platform == "linux" else None


def _file() -> Path:
    return state_directory() / "cluster.json"
