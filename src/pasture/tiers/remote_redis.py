"""A shelf in Redis (or Valkey): one server, or a cluster that shards by itself.

    pasture:1:b<name>    a block, as the wire writes it; expires when nobody has used it for a time
    pasture:1:c<parent>  the heads of what stands behind a block: a sorted set by time, cut to the newest few

A question about a path is one pipeline of STRLEN, which counts as a use where EXISTS would not, so that what is used stays when
the server evicts by LRU. Nothing is pickled. Two connection pools: questions give up with their limit, transfers later; retries
are the breaker's business, not the library's. Redis is imported when a shelf is made. Any thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from pasture.core.errors import ConfigError
from pasture.core.storage import Bytes
from pasture.tiers.remote_ports import CHILDREN, FORMAT, ShelfFull, Usage

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX = b"pasture:%d:" % FORMAT
KEPT_CHILDREN = 2 * CHILDREN
CONNECT_SECONDS = 1.0
TRANSFER_SECONDS = 10.0
READ_BYTES = 1 << 20
"""taken from the socket at once"""
FULL_ERRORS = ("OOM", "MISCONF", "NOSPACE")
"""what a server says that has no memory, or no disk for its log"""


class RedisShelf:
    """`connect` makes a client with a socket timeout in seconds; see `redis_shelf`."""

    def __init__(
        self, address: str, connect: Callable[[float], Any], *, cluster: bool, lookup_seconds: float, ttl_seconds: float
    ) -> None:
        self.address = address
        self.warnings: tuple[str, ...] = ()
        self._connect = connect
        self._cluster = cluster
        self._lookup_seconds = lookup_seconds
        self._ttl_ms = int(1000 * ttl_seconds)
        self._quick: Any = None
        self._bulk: Any = None

    def open(self) -> None:
        quick, bulk = self._connect(max(CONNECT_SECONDS, self._lookup_seconds)), self._connect(TRANSFER_SECONDS)
        quick.strlen(_block(b""))
        self._quick, self._bulk = quick, bulk

    def ping(self) -> None:
        self._quick.strlen(_block(b""))  # which, unlike PING, a cluster that is down and a user without rights do not answer

    def usage(self) -> Usage:
        everywhere = {"target_nodes": "primaries"} if self._cluster else {}
        memory = self._quick.info("memory", **everywhere)
        nodes = list(memory.values()) if self._cluster else [memory]
        return Usage(
            blocks=int(self._quick.dbsize(**everywhere)),
            bytes=sum(int(node.get("used_memory", 0)) for node in nodes),
            budget_bytes=sum(int(node.get("maxmemory", 0)) for node in nodes),
        )

    def stored(self, names: Sequence[bytes], before: Sequence[bytes]) -> Sequence[bool]:
        pipeline = self._quick.pipeline(transaction=False)
        for name in (*names, *before):
            pipeline.strlen(_block(name))
        return [bool(length) for length in pipeline.execute()[: len(names)]]

    def read(self, names: Sequence[bytes]) -> Sequence[Bytes | None]:
        pipeline = self._bulk.pipeline(transaction=False)
        for name in names:
            pipeline.get(_block(name))
        return [np.frombuffer(cast(bytes, value), np.uint8) if value else None for value in pipeline.execute()]

    def write(self, name: bytes, head: bytes, payload: Bytes) -> None:
        with _room():
            self._bulk.set(_block(name), b"".join((head, payload.data)), px=self._ttl_ms)

    def enlist(self, parent: bytes, head: bytes) -> None:
        key = _children(parent)
        with _room():
            pipeline = self._quick.pipeline(transaction=False)
            pipeline.zadd(key, {head: time.time()})
            pipeline.zremrangebyrank(key, 0, -KEPT_CHILDREN - 1)
            pipeline.pexpire(key, self._ttl_ms)
            pipeline.execute()

    def children(self, parents: Sequence[bytes]) -> Sequence[Sequence[bytes]]:
        pipeline = self._quick.pipeline(transaction=False)
        for parent in parents:
            pipeline.zrevrange(_children(parent), 0, KEPT_CHILDREN - 1)
        return cast("list[list[bytes]]", pipeline.execute())

    def remove(self, name: bytes) -> None:
        self._quick.delete(_block(name))

    def close(self) -> None:
        for client in (self._quick, self._bulk):
            client.close()


def redis_shelf(
    servers: Sequence[tuple[str, int]],
    *,
    cluster: bool = False,
    username: str | None = None,
    password: str | None = None,
    database: int = 0,
    tls: bool = False,
    ca_file: str | None = None,
    cert_file: str | None = None,
    key_file: str | None = None,
    lookup_seconds: float,
    ttl_seconds: float,
) -> RedisShelf:
    """One server, or the cluster that these belong to. Raises ConfigError where the package is missing."""
    try:
        from redis import Redis, RedisCluster
        from redis.backoff import NoBackoff
        from redis.cluster import ClusterNode
        from redis.retry import Retry
    except ImportError:
        raise ConfigError("kv_remote: redis:// needs the package redis: pip install 'pasture[redis]'") from None

    options: dict[str, Any] = {
        "username": username,
        "password": password,
        "socket_connect_timeout": CONNECT_SECONDS,
        "socket_read_size": READ_BYTES,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }
    if tls:
        options |= {"ssl": True, "ssl_ca_certs": ca_file, "ssl_certfile": cert_file, "ssl_keyfile": key_file}

    def one(timeout_seconds: float) -> Any:
        [(host, port)] = servers
        return Redis(host=host, port=port, db=database, socket_timeout=timeout_seconds, **options)

    def all_together(timeout_seconds: float) -> Any:
        nodes = [ClusterNode(host, port) for host, port in servers]  # type: ignore[no-untyped-call]
        return RedisCluster(startup_nodes=nodes, socket_timeout=timeout_seconds, require_full_coverage=False, **options)

    address = ",".join(f"{host}:{port}" for host, port in servers)
    connect = all_together if cluster else one
    return RedisShelf(address, connect, cluster=cluster, lookup_seconds=lookup_seconds, ttl_seconds=ttl_seconds)


@contextmanager
def _room() -> Iterator[None]:
    """What a full server says is not that it is broken."""
    from redis.exceptions import OutOfMemoryError, ResponseError

    try:
        yield
    except ResponseError as error:
        if isinstance(error, OutOfMemoryError) or str(error).startswith(FULL_ERRORS):
            raise ShelfFull(str(error)) from None
        raise


def _block(name: bytes) -> bytes:
    return PREFIX + b"b" + name


def _children(parent: bytes) -> bytes:
    return PREFIX + b"c" + parent
