"""Everything that a server keeps about somebody, opened together: one database, and what stands on it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from pasture.core.ports import Clock
from pasture.sessions.database import Database
from pasture.sessions.expiry import Expiry
from pasture.sessions.gate import Gate
from pasture.sessions.public import PublicPrefixes
from pasture.sessions.responses import Responses
from pasture.sessions.store import Sessions
from pasture.sessions.tenants import Keyring, Tenants
from pasture.sessions.values import Share


class State:
    """One server's. Whoever opens it closes it."""

    def __init__(
        self,
        location: str | None = None,
        *,
        keys: Sequence[str] = (),
        share: Share = Share.TENANT,
        wall_clock: Clock = time.time,
        clock: Clock = time.monotonic,
    ) -> None:
        """`location`: see `Database`; `keys`: from the settings, beside those in the database. Raises ConfigError."""
        self.database = Database(location)
        self.share = share
        self.tenants = Tenants(self.database, clock=wall_clock)
        self.keyring = Keyring(self.tenants, keys, clock=clock)
        self.sessions = Sessions(self.database, clock=wall_clock)
        self.responses = Responses(self.database, clock=wall_clock)
        self.public = PublicPrefixes(self.database, clock=wall_clock)
        self.expiry = Expiry(self.database, self.tenants, clock=wall_clock)
        self.gate = Gate(clock=clock)

    def close(self) -> None:
        self.database.close()
