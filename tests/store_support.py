"""Stores for engines in tests: RAM of any size, every transfer worth it."""

from __future__ import annotations

from collections.abc import Sequence

from pasture.core.ports import Engine
from pasture.tiers.compression import Compression
from pasture.tiers.gate import OpenGate
from pasture.tiers.ports import SlowTier
from pasture.tiers.store import TieredStore, open_store


def store_for(
    engine: Engine,
    ram_bytes: int = 1 << 30,
    slow: Sequence[SlowTier] = (),
    compression: Compression = Compression.OFF,
) -> TieredStore:
    """Belongs to whoever runs the engine."""
    return open_store(
        engine.codec,
        ram_bytes,
        divisible=engine.model.shareable,
        cell_bytes=engine.model.cell_bytes,
        slow=slow,
        compression=compression,
        gate=OpenGate(engine.model.cell_bytes),
    )


def still_store_for(engine: Engine, ram_bytes: int) -> TieredStore:
    """A store that does nothing in the background, so that a random run can be repeated."""
    store = store_for(engine, ram_bytes)
    store._upkeep.stop(10.0)
    return store
