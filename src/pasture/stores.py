"""Builds the store that the settings ask for: RAM, behind it the disk and what machines share, encrypted where there is a key.

Part of the composition: knows settings and tiers, and gets from the engine only its codec and what the model needs. Everything
that can be wrong with a directory or a key file is a ConfigError here, before the server listens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from pasture.config import Settings
from pasture.config.remote import MooncakeUrl, RemoteUrl, parse_remote
from pasture.core.storage import SlabCodec, Store
from pasture.core.values import Form, ModelInfo
from pasture.foresight.policies import POLICIES
from pasture.tiers.compression import Compression
from pasture.tiers.disk import DiskTier
from pasture.tiers.eviction import PolicyMaker
from pasture.tiers.gate import CostGate
from pasture.tiers.ports import SlowTier
from pasture.tiers.remote import RemoteTier
from pasture.tiers.remote_mooncake import MooncakeShelf
from pasture.tiers.remote_mooncake import load as load_mooncake
from pasture.tiers.remote_redis import redis_shelf
from pasture.tiers.remote_ring import Ring
from pasture.tiers.remote_server import Server
from pasture.tiers.sealed import SealedWire, read_secret
from pasture.tiers.store import open_store
from pasture.tiers.wire import Wire

DEFAULT_RAM_BYTES = 4 << 30
FREE_SHARE = 0.25
"""of the free memory, at most so much unless somebody said how much"""

DIVERGENCE = {Form.RAW: 0.0, Form.LOSSLESS: 0.0, Form.Q8_0: 0.005, Form.Q4_0: 0.02}
"""KL divergence to the exact answers: what `pasture bench quality` measured on SmolLM2 Q4_1, stored or live, generously rounded
up because other models were not measured"""


Watch = Callable[[PolicyMaker], PolicyMaker]
"""makes of the RAM tier's policies such that somebody else hears too"""


def unwatched(policy: PolicyMaker) -> PolicyMaker:
    return policy


def store_for(
    settings: Settings,
    codec: SlabCodec,
    model: ModelInfo,
    available: Callable[[], int],
    watch: Watch = unwatched,
) -> Store:
    """The store, its threads running. `available`: bytes of memory that the process can still take.

    `watch` wraps the policy of the RAM tier, which hears what enters and leaves it.
    """
    slow, gate = slow_tiers(settings), CostGate(model.cell_bytes)

    def fetch_price() -> float:
        return gate.fetch_price([tier.name for tier in slow if tier.accepts])

    policy = POLICIES[settings.kv_policy](time.monotonic, fetch_price)
    return open_store(
        codec,
        ram_bytes(settings, available()),
        divisible=model.shareable,
        cell_bytes=model.cell_bytes,
        slow=slow,
        compression=Compression(settings.kv_compress),
        allowed=allowed_forms(settings),
        available=available,
        gate=gate,
        policy=watch(policy),
        prefetch=settings.prefetch,
        expire_seconds=settings.kv_expire or settings.session_idle,
    )


def slow_tiers(settings: Settings) -> tuple[SlowTier, ...]:
    """The tiers behind RAM, fastest first. Raises ConfigError for a directory or a key that cannot be trusted."""
    secret = read_secret(Path(settings.kv_key_file)) if settings.kv_key_file is not None else None
    wire = SealedWire(secret) if secret is not None else None
    tiers: list[SlowTier] = []
    if settings.kv_cache is not None:
        tiers.append(DiskTier(Path(settings.kv_cache).expanduser(), settings.kv_disk, wire=wire))
    if settings.kv_remote is not None:
        tiers.append(open_remote(parse_remote(settings.kv_remote), wire))
    return tuple(tiers)


def open_remote(url: RemoteUrl, wire: Wire | None) -> RemoteTier:
    """The remote tier at this address; it connects in the background. Raises ConfigError where a package is missing."""
    if isinstance(url, MooncakeUrl):
        load_mooncake()
        pool = MooncakeShelf(url.master, protocol=url.protocol, device=url.device, share_bytes=url.share_bytes, host=url.host)
        ring = Ring([Server(pool, lookup_seconds=url.lookup_seconds)])
        return RemoteTier(
            ring, kind="mooncake", transport=pool.transport, lookup_seconds=url.lookup_seconds, wire=wire, list_all=False
        )
    parts = [url.servers] if url.cluster else [(server,) for server in url.servers]
    shelves = [
        redis_shelf(
            part,
            cluster=url.cluster,
            username=url.username,
            password=url.password,
            database=url.database,
            tls=url.tls,
            ca_file=url.ca_file,
            cert_file=url.cert_file,
            key_file=url.key_file,
            lookup_seconds=url.lookup_seconds,
            ttl_seconds=url.ttl_seconds,
        )
        for part in parts
    ]
    ring = Ring([Server(shelf, lookup_seconds=url.lookup_seconds) for shelf in shelves], url.replicas)
    transport = "tls" if url.tls else "tcp"
    return RemoteTier(ring, kind="redis", transport=transport, lookup_seconds=url.lookup_seconds, wire=wire)


def ram_bytes(settings: Settings, available: int) -> int:
    """The RAM tier's budget."""
    if settings.kv_ram is not None:
        return settings.kv_ram
    return min(DEFAULT_RAM_BYTES, int(available * FREE_SHARE))


def allowed_forms(settings: Settings) -> frozenset[Form]:
    """What `auto` may use within the quality bound; a form asked for by name is used whatever it costs."""
    if settings.kv_compress not in ("auto", "off"):
        return frozenset(Form)
    return frozenset(form for form, divergence in DIVERGENCE.items() if divergence <= settings.kv_quality)
