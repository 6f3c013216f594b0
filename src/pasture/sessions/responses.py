"""Stored answers of `/v1/responses`: each ends a turn, so that the next request can name it and send only what is new.

Somebody else's response is the same as none. A tenant keeps at most `max_responses`; storing one more forgets the one that was
used least recently, because clients store by default and rarely delete. Where that cannot bring enough room, it is found out by
reading alone: nobody who writes waits for it. Any thread may call.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sqlalchemy import Connection, Row, text

from pasture.core.errors import NotFound
from pasture.core.ports import Clock
from pasture.sessions import turns
from pasture.sessions.database import Database
from pasture.sessions.values import Message, StoredResponse, Tenant

LOOK_ROWS = 16
"""of the longest unused, at first: one more rarely costs more than a few"""


class Responses:
    """The responses in one database."""

    def __init__(self, database: Database, *, clock: Clock = time.time) -> None:
        self._database = database
        self._clock = clock

    def open(self, tenant: Tenant, response_id: str) -> tuple[StoredResponse, list[Message]]:
        """A response and all that was said up to its end. Raises NotFound. Counts as a use."""
        with self._database.write() as connection:
            row = _row(connection, tenant, response_id)
            connection.execute(
                text("UPDATE responses SET last_used = :now WHERE response_id = :id"), {"now": self._clock(), "id": response_id}
            )
            return _as_response(row), turns.messages_of(connection, tenant, row.head)

    def get(self, tenant: Tenant, response_id: str) -> StoredResponse:
        """Raises NotFound."""
        with self._database.read() as connection:
            return _as_response(_row(connection, tenant, response_id))

    def add(
        self,
        tenant: Tenant,
        response_id: str,
        body: Mapping[str, object],
        messages: Sequence[Message],
        previous: str | None = None,
    ) -> None:
        """Keep an answer behind what was said up to `previous`. `messages`: only what came since, its own reply last.

        Makes room among older responses where the tenant has too many. Raises NotFound when `previous` was deleted meanwhile,
        RateLimited when even that is not enough.
        """
        encoded = json.dumps(dict(body), ensure_ascii=False, separators=(",", ":"))
        now, n_bytes = self._clock(), len(encoded.encode())
        needed_bytes = n_bytes + len(turns.encoded(messages).encode())
        with self._database.read() as connection:
            if turns.excess_bytes(connection, tenant) + needed_bytes > 0:
                _find_room(connection, tenant, needed_bytes, _head(connection, tenant, previous))
        with self._database.write() as connection:
            parent = _head(connection, tenant, previous)
            _find_room(connection, tenant, needed_bytes, parent).forget(connection)
            head = turns.add_turn(connection, tenant, parent, messages)
            turns.keep(connection, head)
            turns.count_bytes(connection, tenant.name, n_bytes)
            values = {"id": response_id, "tenant": tenant.name, "head": head, "now": now, "body": encoded, "n": n_bytes}
            connection.execute(text("INSERT INTO responses VALUES (:id, :tenant, :head, :now, :now, :body, :n)"), values)

    def delete(self, tenant: Tenant, response_id: str) -> None:
        """Raises NotFound. Responses that go on from this one keep their past."""
        with self._database.write() as connection:
            forget(connection, _row(connection, tenant, response_id))


@dataclass(slots=True)
class _Leaving:
    """Responses that make way together."""

    tenant: Tenant
    release: turns.Release
    ids: list[str] = field(default_factory=list)
    body_bytes: int = 0

    @property
    def n_bytes(self) -> int:
        return self.body_bytes + self.release.n_bytes

    def add(self, row: Row[tuple[object]]) -> None:
        self.ids.append(row.response_id)
        self.body_bytes += row.n_bytes
        self.release.let_go(row.head)

    def forget(self, connection: Connection) -> None:
        """Delete them and what only they kept."""
        if self.ids:
            turns.delete(connection, "responses", "response_id", self.ids)
            turns.count_bytes(connection, self.tenant.name, -self.body_bytes)
            self.release.apply()


def _find_room(connection: Connection, tenant: Tenant, needed_bytes: int, parent: str | None) -> _Leaving:
    """The longest unused responses that one of `needed_bytes` behind `parent` needs the place of; nothing is deleted yet.

    Raises RateLimited when the place of all of them would not do.
    """
    found = connection.execute(text("SELECT count(*) FROM responses WHERE tenant = :tenant"), {"tenant": tenant.name})
    too_many = int(found.scalar_one()) + 1 - tenant.limits.max_responses
    excess_bytes = turns.excess_bytes(connection, tenant) + needed_bytes
    oldest = text(
        "SELECT response_id, head, n_bytes FROM responses WHERE tenant = :tenant "
        "ORDER BY last_used, response_id LIMIT :rows OFFSET :seen"
    )
    leaving = _Leaving(tenant, turns.Release(connection, tenant, held=parent))
    n_rows = LOOK_ROWS
    while len(leaving.ids) < too_many or leaving.n_bytes < excess_bytes:
        rows = connection.execute(oldest, {"tenant": tenant.name, "rows": n_rows, "seen": len(leaving.ids)}).all()
        if not rows:
            break
        leaving.release.look([row.head for row in rows])
        for row in rows:
            if len(leaving.ids) >= too_many and leaving.n_bytes >= excess_bytes:
                break
            leaving.add(row)
        n_rows = turns.BATCH_ROWS
    if leaving.n_bytes < excess_bytes:
        raise turns.full(tenant)
    return leaving


def _head(connection: Connection, tenant: Tenant, response_id: str | None) -> str | None:
    """Where a response ends; None for none. Raises NotFound."""
    return None if response_id is None else str(_row(connection, tenant, response_id).head)


def forget(connection: Connection, row: Row[tuple[object]]) -> None:
    """Delete a response's row and what only it kept."""
    connection.execute(text("DELETE FROM responses WHERE response_id = :id"), {"id": row.response_id})
    turns.count_bytes(connection, row.tenant, -row.n_bytes)
    turns.let_go(connection, row.head)


def _row(connection: Connection, tenant: Tenant, response_id: str) -> Row[tuple[object]]:
    row = connection.execute(
        text("SELECT * FROM responses WHERE response_id = :id AND tenant = :tenant"),
        {"id": response_id.replace("\0", ""), "tenant": tenant.name},  # no database but SQLite takes a NUL
    ).first()
    if row is None:
        raise NotFound(f"there is no response {response_id[:100]!r}", param="response_id")
    return row


def _as_response(row: Row[tuple[object]]) -> StoredResponse:
    return StoredResponse(row.response_id, row.tenant, row.head, row.created, json.loads(row.body))
