"""Stored answers of `/v1/responses`: each ends a turn, so that the next request can name it and send only what is new.

Somebody else's response is the same as none. A tenant keeps at most `max_responses`; storing one more forgets the one that was
used least recently, because clients store by default and rarely delete. Any thread may call.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence

from sqlalchemy import Connection, Row, text

from pasture.core.errors import NotFound
from pasture.core.ports import Clock
from pasture.sessions import turns
from pasture.sessions.database import Database
from pasture.sessions.values import Message, StoredResponse, Tenant


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
        now = self._clock()
        with self._database.write() as connection:
            parent = None if previous is None else _row(connection, tenant, previous).head
            head = turns.add_turn(connection, tenant, parent, messages)
            turns.keep(connection, head)
            n_bytes = len(encoded.encode())
            turns.count_bytes(connection, tenant.name, n_bytes)
            values = {"id": response_id, "tenant": tenant.name, "head": head, "now": now, "body": encoded, "n": n_bytes}
            connection.execute(text("INSERT INTO responses VALUES (:id, :tenant, :head, :now, :now, :body, :n)"), values)
            self._make_room(connection, tenant, keep=response_id)

    def delete(self, tenant: Tenant, response_id: str) -> None:
        """Raises NotFound. Responses that go on from this one keep their past."""
        with self._database.write() as connection:
            forget(connection, _row(connection, tenant, response_id))

    @staticmethod
    def _make_room(connection: Connection, tenant: Tenant, keep: str) -> None:
        """Forget the longest unused ones, but for `keep`, as far as limits of number and bytes ask for it."""
        found = connection.execute(text("SELECT count(*) FROM responses WHERE tenant = :tenant"), {"tenant": tenant.name})
        too_many = int(found.scalar_one()) - tenant.limits.max_responses
        oldest = text("SELECT * FROM responses WHERE tenant = :tenant AND response_id <> :keep ORDER BY last_used LIMIT 1")
        while too_many > 0 or turns.excess_bytes(connection, tenant) > 0:
            row = connection.execute(oldest, {"tenant": tenant.name, "keep": keep}).first()
            if row is None:
                break
            forget(connection, row)
            too_many -= 1
        turns.check_room(connection, tenant)


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
