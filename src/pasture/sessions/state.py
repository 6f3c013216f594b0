"""Everything that a server keeps about somebody, opened together: one database, and what stands on it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from sqlalchemy import text

from pasture.core.errors import NotFound
from pasture.core.ports import Clock
from pasture.core.values import Namespace
from pasture.sessions.database import Database
from pasture.sessions.expiry import Expiry
from pasture.sessions.gate import Gate
from pasture.sessions.public import PublicPrefixes
from pasture.sessions.responses import Responses
from pasture.sessions.store import Sessions
from pasture.sessions.tenants import Keyring, Tenants
from pasture.sessions.values import DEFAULT_TENANT, Limits, Share, Tenant

log = logging.getLogger(__name__)

SWEEP_SECONDS = 60.0
KeepFor = Callable[[Mapping[Namespace, float]], None]
"""see `core.ports.Service.keep_for`"""

MISSED_SWEEPS = 3
"""before something is wrong with them"""
HIGHEST_PRIORITY = 1
"""where nobody has a key, everybody is trusted alike"""


@dataclass(frozen=True, slots=True)
class Sweeper:
    """How the forgetting of what is due goes."""

    alive: bool
    every_seconds: float
    since_seconds: float
    """since it last did so, or was started"""

    @property
    def late(self) -> bool:
        return not self.alive or self.since_seconds > MISSED_SWEEPS * self.every_seconds + SWEEP_SECONDS


class State:
    """One server's. Whoever opens it closes it."""

    def __init__(
        self,
        location: str | None = None,
        *,
        keys: Sequence[str] = (),
        share: Share = Share.TENANT,
        limits: Limits | None = None,
        wall_clock: Clock = time.time,
        clock: Clock = time.monotonic,
    ) -> None:
        """`location`: see `Database`; `keys`: from the settings, beside those in the database. Raises ConfigError."""
        self.database = Database(location)
        self.share = share
        self.now = wall_clock
        self.open_tenant = Tenant(DEFAULT_TENANT, limits=replace(limits or Limits(), max_priority=HIGHEST_PRIORITY))
        """who everybody is on a server without keys"""
        self.tenants = Tenants(self.database, limits, clock=wall_clock)
        self.keyring = Keyring(self.tenants, keys, clock=clock)
        self.sessions = Sessions(self.database, clock=wall_clock)
        self.responses = Responses(self.database, clock=wall_clock)
        self.public = PublicPrefixes(self.database, clock=wall_clock)
        self.expiry = Expiry(self.database, self.tenants, clock=wall_clock)
        self._clock = clock
        self._sweeper: threading.Thread | None = None
        self._sweep_seconds = self._swept_at = 0.0
        self._ended = threading.Event()
        self.gate = Gate(clock=clock)

    def keep_sweeping(self, keep_kv: KeepFor, seconds: float = SWEEP_SECONDS) -> None:
        """Forget what is due now and every so often, on a thread of its own, until `close`.

        `keep_kv` is told each time for how long KV of tenants is kept that have an idle time of their own.
        """
        self._sweep_seconds, self._swept_at = seconds, self._clock()
        self._sweeper = threading.Thread(target=self._sweep, args=(keep_kv,), name="pasture-expiry", daemon=True)
        self._sweeper.start()

    @property
    def sweeper(self) -> Sweeper | None:
        """None where nobody has begun to sweep."""
        if self._sweeper is None:
            return None
        return Sweeper(self._sweeper.is_alive(), self._sweep_seconds, self._clock() - self._swept_at)

    def idle_seconds(self) -> dict[Namespace, float]:
        """By the namespaces of tenants that have an idle time of their own; none where everybody shares one."""
        if self.share is Share.ALL:
            return {}
        return {tenant.namespace(): tenant.limits.idle_seconds for tenant in self.tenants.with_own("idle_seconds")}

    def tenant_named(self, name: str) -> Tenant | None:
        """Who sessions are filed under; None for a tenant whose key is no longer in the settings."""
        if name == self.open_tenant.name and not self.keyring.closed():
            return self.open_tenant
        with suppress(NotFound):
            return self.keyring.written(name) or self.tenants.get(name)
        return None

    def kept(self) -> dict[str, int]:
        """How much there is of everything that is kept, over all tenants."""
        with self.database.read() as connection:
            rows = connection.execute(
                text(
                    "SELECT (SELECT count(*) FROM sessions), (SELECT count(*) FROM responses), (SELECT count(*) FROM turns), "
                    "(SELECT coalesce(sum(n_bytes), 0) FROM stored)"
                )
            ).one()
        return dict(zip(("sessions", "responses", "turns", "bytes"), (int(n) for n in rows), strict=True))

    def close(self) -> None:
        self._ended.set()
        if self._sweeper is not None:
            self._sweeper.join()
        self.database.close()

    def _sweep(self, keep_kv: KeepFor) -> None:
        while True:
            try:
                keep_kv(self.idle_seconds())
                swept = self.expiry.sweep()
                self._swept_at = self._clock()
                if swept.sessions or swept.responses:
                    log.info("forgot %d sessions and %d responses that nobody used", swept.sessions, swept.responses)
            except Exception:  # whatever it is, there is a next time
                log.exception("nothing could be forgotten this time")
            if self._ended.wait(self._sweep_seconds):
                return
