"""What nobody uses any more is forgotten: sessions and responses past their tenant's idle time or lifetime.

Rows go, and with them the turns that only they kept, in small transactions so that nobody waits for a sweep. KV is not
touched here: in the live cache and in the tiers what is unused makes way by itself. Pinned sessions stay. Any thread may call.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from sqlalchemy import text

from pasture.core.ports import Clock
from pasture.sessions import responses, session_rows
from pasture.sessions.database import Database
from pasture.sessions.tenants import Tenants
from pasture.sessions.values import Limits

BATCH_ROWS = 200


@dataclass(frozen=True, slots=True)
class Swept:
    """How much one sweep has forgotten."""

    sessions: int
    responses: int


class Expiry:
    """Sweeps one database."""

    def __init__(self, database: Database, tenants: Tenants, *, clock: Clock = time.time) -> None:
        self._database = database
        self._tenants = tenants
        self._clock = clock

    def sweep(self) -> Swept:
        """Forget all that is due."""
        known = {tenant.name: tenant.limits for tenant in self._tenants.all()}
        with self._database.read() as connection:
            names = connection.execute(text("SELECT tenant FROM sessions UNION SELECT tenant FROM responses")).scalars().all()
        n_sessions = n_responses = 0
        for name in names:
            limits = known.get(name, self._tenants.usual)
            n_sessions += self._sweep(name, limits, "sessions")
            n_responses += self._sweep(name, limits, "responses")
        return Swept(n_sessions, n_responses)

    def _sweep(self, tenant: str, limits: Limits, table: str) -> int:
        now = self._clock()
        due = text(
            f"SELECT * FROM {table} WHERE tenant = :tenant AND (last_used < :idle OR created < :born) "
            + ("AND pinned = 0 " if table == "sessions" else "")
            + "LIMIT :rows"
        )
        values = {
            "tenant": tenant,
            "idle": now - limits.idle_seconds,
            "born": now - limits.lifetime_seconds,
            "rows": BATCH_ROWS,
        }
        forget = session_rows.forget if table == "sessions" else responses.forget
        total = 0
        while True:
            with self._database.write() as connection:
                rows = connection.execute(due, values).all()
                for row in rows:
                    forget(connection, row)
            total += len(rows)
            if len(rows) < BATCH_ROWS:
                return total
