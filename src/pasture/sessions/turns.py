"""Turns: conversations as a tree in which every common past exists once.

    system, user -- assistant, user -- assistant          a turn holds the messages that one request added
                 `- assistant, user                       a fork is one more pointer to a turn

A turn counts who points at it (later turns, sessions, responses) and goes when nobody does, and with it go the ancestors that
only it kept. All functions work inside a transaction of their caller and see one tenant's turns only.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence

from sqlalchemy import Connection, Row, bindparam, text

from pasture.core.errors import InvariantBroken, RateLimited
from pasture.sessions.values import Message, Tenant

FULL_RETRY_SECONDS = 3600.0
BATCH_ROWS = 500
"""that one statement names"""

_LINES = text(
    "WITH RECURSIVE line(turn_id, parent, refs, n_bytes) AS ("
    "SELECT turn_id, parent, refs, n_bytes FROM turns WHERE turn_id IN :ids AND tenant = :tenant "
    "UNION SELECT t.turn_id, t.parent, t.refs, t.n_bytes FROM turns t JOIN line ON t.turn_id = line.parent) "
    "SELECT turn_id, parent, refs, n_bytes FROM line"
).bindparams(bindparam("ids", expanding=True))


class Release:
    """Turns that are let go together: what goes with them is found by reading, and `apply` does it in few statements.

    Between the two, nobody else may write.
    """

    def __init__(self, connection: Connection, tenant: Tenant, held: str | None = None) -> None:
        """`held`: a turn that stays, because something is about to point at it."""
        self._connection = connection
        self._tenant = tenant
        self._held = held
        self._found: dict[str, Row[tuple[object]]] = {}
        self._fewer: Counter[str] = Counter()
        """turn -> how many point at it no longer"""
        self._gone: set[str] = set()
        self.n_bytes = 0
        """of the turns that go"""

    def look(self, turn_ids: Sequence[str]) -> None:
        """Read turns and all that is before them, so that they can be let go."""
        for batch in batches([turn_id for turn_id in turn_ids if turn_id not in self._found]):
            rows = self._connection.execute(_LINES, {"ids": batch, "tenant": self._tenant.name})
            self._found |= {row.turn_id: row for row in rows}

    def let_go(self, turn_id: str | None) -> None:
        """One fewer points at a turn that was looked at; changes nothing in the database."""
        while turn_id is not None:
            self._fewer[turn_id] += 1
            row = self._found[turn_id]
            if turn_id == self._held or self._fewer[turn_id] < row.refs:
                return
            self._gone.add(turn_id)
            self.n_bytes += row.n_bytes
            turn_id = row.parent

    def apply(self) -> None:
        """Write down what was let go."""
        delete(self._connection, "turns", "turn_id", list(self._gone))
        left = [{"turn": turn_id, "by": by} for turn_id, by in self._fewer.items() if turn_id not in self._gone]
        if left:
            self._connection.execute(text("UPDATE turns SET refs = refs - :by WHERE turn_id = :turn"), left)
        count_bytes(self._connection, self._tenant.name, -self.n_bytes)


def add_turn(connection: Connection, tenant: Tenant, parent: str | None, messages: Sequence[Message]) -> str:
    """A turn behind `parent`, which nobody points at yet."""
    body = encoded(messages)
    n_bytes = len(body.encode())
    count_bytes(connection, tenant.name, n_bytes)
    before = 0 if parent is None else length(connection, tenant, parent)
    turn_id = "turn_" + secrets.token_hex(12)
    row = {
        "turn": turn_id,
        "tenant": tenant.name,
        "parent": parent,
        "n": before + len(messages),
        "messages": body,
        "bytes": n_bytes,
    }
    connection.execute(text("INSERT INTO turns VALUES (:turn, :tenant, :parent, :n, :messages, :bytes, 0)"), row)
    if parent is not None:
        keep(connection, parent)
    return turn_id


def encoded(messages: Sequence[Message]) -> str:
    """Messages as a turn has them."""
    return json.dumps(list(messages), ensure_ascii=False, separators=(",", ":"))


def keep(connection: Connection, turn_id: str, by: int = 1) -> None:
    """So many more point at a turn."""
    connection.execute(text("UPDATE turns SET refs = refs + :by WHERE turn_id = :turn"), {"turn": turn_id, "by": by})


def let_go(connection: Connection, turn_id: str | None) -> None:
    """One fewer points at a turn; what nobody points at any more goes, up the tree."""
    while turn_id is not None:
        row = connection.execute(
            text("UPDATE turns SET refs = refs - 1 WHERE turn_id = :turn RETURNING refs, parent, tenant, n_bytes"),
            {"turn": turn_id},
        ).first()
        if row is None or row.refs > 0:
            return
        connection.execute(text("DELETE FROM turns WHERE turn_id = :turn"), {"turn": turn_id})
        count_bytes(connection, row.tenant, -row.n_bytes)
        turn_id = row.parent


def count_bytes(connection: Connection, tenant: str, n_bytes: int) -> None:
    """The tenant stores so many bytes more."""
    connection.execute(
        text("INSERT INTO stored VALUES (:tenant, :n) ON CONFLICT (tenant) DO UPDATE SET n_bytes = stored.n_bytes + :n"),
        {"tenant": tenant, "n": n_bytes},
    )


def excess_bytes(connection: Connection, tenant: Tenant) -> int:
    """By how much a tenant stores more than it may; negative where there is room."""
    used = connection.execute(text("SELECT n_bytes FROM stored WHERE tenant = :tenant"), {"tenant": tenant.name}).scalar()
    return int(used or 0) - tenant.limits.max_transcript_bytes


def check_room(connection: Connection, tenant: Tenant) -> None:
    """Raises RateLimited when the tenant stores more than it may: the transaction that went too far is undone."""
    if excess_bytes(connection, tenant) > 0:
        raise full(tenant)


def full(tenant: Tenant) -> RateLimited:
    """The tenant stores as much as it may."""
    return RateLimited(
        f"what a tenant stores may be {tenant.limits.max_transcript_bytes} bytes; delete sessions or responses",
        retry_after_seconds=FULL_RETRY_SECONDS,
    )


def delete(connection: Connection, table: str, key: str, ids: Sequence[str]) -> None:
    """Rows, many with one statement, and nothing of what they point at."""
    statement = text(f"DELETE FROM {table} WHERE {key} IN :ids").bindparams(bindparam("ids", expanding=True))
    for batch in batches(ids):
        connection.execute(statement, {"ids": batch})


def batches(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """As many at a time as a statement names."""
    return (ids[start : start + BATCH_ROWS] for start in range(0, len(ids), BATCH_ROWS))


def length(connection: Connection, tenant: Tenant, turn_id: str) -> int:
    """Messages from the beginning to the end of a turn."""
    row = connection.execute(
        text("SELECT n_messages FROM turns WHERE turn_id = :turn AND tenant = :tenant"),
        {"turn": turn_id, "tenant": tenant.name},
    ).first()
    if row is None:
        raise InvariantBroken(f"the turn {turn_id} is pointed at and does not exist")
    return int(row.n_messages)


def path(connection: Connection, tenant: Tenant, turn_id: str | None) -> list[tuple[str, list[Message]]]:
    """(turn, its messages), from the beginning to the end of a turn."""
    if turn_id is None:
        return []
    rows = connection.execute(
        text(
            "WITH RECURSIVE line(turn_id, parent, n_messages, messages) AS ("
            "SELECT turn_id, parent, n_messages, messages FROM turns WHERE turn_id = :turn AND tenant = :tenant "
            "UNION ALL SELECT t.turn_id, t.parent, t.n_messages, t.messages FROM turns t JOIN line ON t.turn_id = line.parent) "
            "SELECT turn_id, messages FROM line ORDER BY n_messages"
        ),
        {"turn": turn_id, "tenant": tenant.name},
    ).all()
    return [(row.turn_id, json.loads(row.messages)) for row in rows]


def messages_of(connection: Connection, tenant: Tenant, turn_id: str | None) -> list[Message]:
    """All that was said up to the end of a turn."""
    return [message for _, messages in path(connection, tenant, turn_id) for message in messages]


def branch(connection: Connection, tenant: Tenant, turn_id: str | None, messages: Sequence[Message]) -> str | None:
    """A turn at which exactly `messages` have been said, sharing as many turns as they have in common with `turn_id`'s line.

    None for no messages. A turn that is made here is pointed at by nobody yet.
    """
    at, last = 0, None
    for turn, said in path(connection, tenant, turn_id):
        if list(messages[at : at + len(said)]) != said:
            break
        at, last = at + len(said), turn
    return last if at == len(messages) else add_turn(connection, tenant, last, messages[at:])
