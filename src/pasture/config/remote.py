"""The address of a store that several machines share, as one URL, taken apart and checked.

    redis://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]...][/DB][?cluster=1&replicas=2&ttl=168h&lookup=50ms]
    rediss://...                                            the same over TLS; ca=FILE&cert=FILE&key=FILE
    mooncake://MASTER[:PORT][?protocol=tcp|rdma&device=mlx5_0&share=1GiB&host=ADDRESS&lookup=50ms]

Says what a URL means and nothing about what is there. A text that cannot be read raises ValueError with a sentence that says
what can, and never shows the password. Pure functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from pasture.config.units import parse_bytes, parse_seconds

REDIS_PORT = 6379
MASTER_PORT = 50051
LOOKUP_SECONDS = 0.05
TTL_SECONDS = 7 * 24 * 3600.0
SHARE_BYTES = 1 << 30

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """One server, several that a ring shards, or a cluster."""

    servers: tuple[Address, ...]
    cluster: bool
    replicas: int
    """servers of a ring that hold each block"""
    username: str | None
    password: str | None
    database: int
    tls: bool
    ca_file: str | None
    cert_file: str | None
    key_file: str | None
    ttl_seconds: float
    """how long a block stays that nobody writes again"""
    lookup_seconds: float
    """how long anybody waits to be told what is there"""


@dataclass(frozen=True, slots=True)
class MooncakeUrl:
    """A pool of lent memory, by the address of its master."""

    master: Address
    protocol: Literal["tcp", "rdma"]
    device: str
    """of RDMA; empty: the library chooses"""
    share_bytes: int
    """what this machine lends"""
    host: str | None
    """where others find this machine's memory; None: the address from which it reaches the master"""
    lookup_seconds: float


RemoteUrl = RedisUrl | MooncakeUrl


def parse_remote(text: str) -> RemoteUrl:
    """The parts of the URL. Raises ValueError."""
    try:
        url = urlsplit(text)
    except ValueError:
        raise ValueError("not a URL such as redis://HOST or mooncake://MASTER") from None
    try:
        options = dict(parse_qsl(url.query, strict_parsing=True)) if url.query else {}
    except ValueError:
        raise ValueError("options are written as ?name=value&name=value") from None
    if url.scheme in ("redis", "rediss"):
        return _redis(url.netloc, url.path, options, tls=url.scheme == "rediss")
    if url.scheme == "mooncake":
        return _mooncake(url.netloc, url.path, options)
    raise ValueError(
        f"{url.scheme or 'it'}:// is no store that several machines share; redis://, rediss:// and mooncake:// are"
    )


def _redis(netloc: str, path: str, options: Mapping[str, str], *, tls: bool) -> RedisUrl:
    known = {"cluster", "replicas", "ttl", "lookup"} | ({"ca", "cert", "key"} if tls else set())
    _only(options, known)
    user, at, hosts = netloc.rpartition("@")
    name, _, password = user.partition(":")
    servers = tuple(_address(host, REDIS_PORT) for host in hosts.split(","))
    if len(set(servers)) < len(servers):
        raise ValueError("a server is named twice")
    replicas, cluster = _number(options.get("replicas", "1"), "replicas"), _yes(options.get("cluster", "0"))
    if not 1 <= replicas <= len(servers):
        raise ValueError(f"replicas={replicas} with {len(servers)} servers: from 1 up to as many as there are servers")
    if cluster and replicas > 1:
        raise ValueError("a cluster replicates by itself: replicas belongs to a list of plain servers")
    database = _number(path.strip("/") or "0", "the database behind the host")
    if cluster and database:
        raise ValueError("a cluster has only database 0")
    return RedisUrl(
        servers=servers,
        cluster=cluster,
        replicas=replicas,
        username=unquote(name) or None if at else None,
        password=unquote(password) or None if at else None,
        database=database,
        tls=tls,
        ca_file=options.get("ca"),
        cert_file=options.get("cert"),
        key_file=options.get("key"),
        ttl_seconds=_seconds(options, "ttl", TTL_SECONDS),
        lookup_seconds=_seconds(options, "lookup", LOOKUP_SECONDS),
    )


def _mooncake(netloc: str, path: str, options: Mapping[str, str]) -> MooncakeUrl:
    _only(options, {"protocol", "device", "share", "host", "lookup"})
    if "@" in netloc or path.strip("/"):
        raise ValueError("mooncake://MASTER[:PORT] has neither users nor a path: its ports trust whoever reaches them")
    protocol = options.get("protocol", "tcp")
    if protocol not in ("tcp", "rdma"):
        raise ValueError(f"protocol={protocol}: tcp or rdma")
    return MooncakeUrl(
        master=_address(netloc, MASTER_PORT),
        protocol="rdma" if protocol == "rdma" else "tcp",
        device=options.get("device", ""),
        share_bytes=parse_bytes(options["share"]) if "share" in options else SHARE_BYTES,
        host=options.get("host"),
        lookup_seconds=_seconds(options, "lookup", LOOKUP_SECONDS),
    )


def _only(options: Mapping[str, str], known: set[str]) -> None:
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"{unknown[0]} is no option here; {', '.join(sorted(known))} are")


def _address(text: str, port: int) -> Address:
    try:
        parts = urlsplit(f"//{text}")
        host, given = parts.hostname, parts.port
    except ValueError:
        raise ValueError("a port is a number up to 65535") from None
    if not host:
        raise ValueError("a host is missing")
    return host, given or port


def _number(text: str, what: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{what} is a number, not {text[:40]!r}")
    return int(text)


def _yes(text: str) -> bool:
    answers = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if text.lower() not in answers:
        raise ValueError(f"cluster={text[:40]}: 1 or 0")
    return answers[text.lower()]


def _seconds(options: Mapping[str, str], name: str, usual: float) -> float:
    if name not in options:
        return usual
    seconds = parse_seconds(options[name])
    if seconds <= 0:
        raise ValueError(f"{name} is a time above 0")
    return seconds
