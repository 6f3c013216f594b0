"""Sessions as rows: how one is written down, found, read, counted and forgotten.

Functions of `store` and `expiry`, inside a transaction of their caller. What a row points at, its last turn and its context, is
counted there (`turns`, `contexts`); its metadata counts here among the bytes that its tenant stores.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from sqlalchemy import Connection, Row, text

from pasture.core.errors import Conflict, NotFound, RateLimited
from pasture.sessions import contexts, turns
from pasture.sessions.values import Counters, Message, OpenSession, Session, Tenant


class AnyHead(Enum):
    """Whatever the session's last turn is."""

    ANY = "any"


ANY_HEAD = AnyHead.ANY

_INSERT = text(
    "INSERT INTO sessions VALUES (:id, :tenant, :name, :head, :n_messages, :n_tokens, :now, :now, 0, :parent, "
    ":parent_messages, :metadata, 0, 0, 0, 0, :only_named, :context)"
)


def insert(
    connection: Connection, sessions: Sequence[Session], context_digest: str | None, *, only_named: bool = False
) -> None:
    """Write down new sessions, all of one tenant and with one context, which counts them already."""
    rows = [_values(session) | {"only_named": int(only_named), "context": context_digest} for session in sessions]
    connection.execute(_INSERT, rows)
    turns.count_bytes(connection, sessions[0].tenant, sum(len(str(row["metadata"])) for row in rows))


def count_use(
    connection: Connection, row: Row[tuple[object]], used: Counters, context: Mapping[str, object] | None, *, only_named: bool
) -> None:
    """Add to a session's counters; its context is another one now, where one is given."""
    digest = row.context_digest
    if context is not None:
        digest = contexts.keep(connection, row.tenant, context)
        contexts.let_go(connection, row.tenant, row.context_digest)
    values = {
        "id": row.session_id,
        "requests": used.requests,
        "prompt": used.prompt_tokens,
        "cached": used.cached_tokens,
        "reply": used.reply_tokens,
        "context": digest,
        "only_named": int(only_named),
    }
    connection.execute(
        text(
            "UPDATE sessions SET requests = requests + :requests, prompt_tokens = prompt_tokens + :prompt, "
            "cached_tokens = cached_tokens + :cached, reply_tokens = reply_tokens + :reply, context_digest = :context, "
            "only_named = :only_named WHERE session_id = :id"
        ),
        values,
    )


def make_room(connection: Connection, tenant: Tenant, n: int, keep: str | None = None) -> None:
    """Forget as many as `n` new ones need of those that were only named, but for `keep`. Raises RateLimited for too few."""
    too_many = count(connection, tenant) + n - tenant.limits.max_sessions
    if too_many <= 0:
        return
    oldest = text(
        "SELECT session_id, head, context_digest, length(metadata) AS n_bytes FROM sessions "
        "WHERE tenant = :tenant AND only_named = 1 AND pinned = 0 ORDER BY last_used, session_id LIMIT :rows"
    )
    rows = connection.execute(oldest, {"tenant": tenant.name, "rows": too_many + 1}).all()
    rows = [row for row in rows if row.session_id != keep][:too_many]
    if len(rows) < too_many:
        raise RateLimited(
            f"a tenant may have {tenant.limits.max_sessions} sessions; delete some, or let them expire",
            retry_after_seconds=turns.FULL_RETRY_SECONDS,
        )
    turns.delete(connection, "sessions", "session_id", [row.session_id for row in rows])
    release = turns.Release(connection, tenant)
    release.look([row.head for row in rows if row.head is not None])
    for row in rows:
        release.let_go(row.head)
    release.apply()
    for digest, n_fewer in Counter(row.context_digest for row in rows).items():
        contexts.let_go(connection, tenant.name, digest, n_fewer)
    turns.count_bytes(connection, tenant.name, -sum(row.n_bytes for row in rows))


def forget(connection: Connection, row: Row[tuple[object]]) -> None:
    """Delete a session's row and what only it kept."""
    connection.execute(text("DELETE FROM sessions WHERE session_id = :id"), {"id": row.session_id})
    turns.let_go(connection, row.head)
    contexts.let_go(connection, row.tenant, row.context_digest)
    turns.count_bytes(connection, row.tenant, -len(row.metadata))


def new(tenant: Tenant, head: str | None, n_messages: int, now: float) -> Session:
    """One that is not written down yet."""
    return Session(
        session_id=new_id(),
        tenant=tenant.name,
        name=None,
        head=head,
        n_messages=n_messages,
        n_tokens=0,
        created=now,
        last_used=now,
        pinned=False,
        parent=None,
        parent_messages=0,
    )


def new_id() -> str:
    return "sess_" + secrets.token_hex(16)


def _values(session: Session) -> dict[str, object]:
    return {
        "id": session.session_id,
        "tenant": session.tenant,
        "name": session.name,
        "head": session.head,
        "n_messages": session.n_messages,
        "n_tokens": session.n_tokens,
        "now": session.created,
        "parent": session.parent,
        "parent_messages": session.parent_messages,
        "metadata": json.dumps(dict(session.metadata)),  # ASCII, so that it has as many bytes as characters
    }


def count(connection: Connection, tenant: Tenant) -> int:
    found = connection.execute(text("SELECT count(*) FROM sessions WHERE tenant = :tenant"), {"tenant": tenant.name})
    return int(found.scalar_one())


def row_of(connection: Connection, tenant: Tenant, session_id: str) -> Row[tuple[object]]:
    """Raises NotFound."""
    row = connection.execute(
        text("SELECT * FROM sessions WHERE session_id = :id AND tenant = :tenant"),
        {"id": session_id.replace("\0", ""), "tenant": tenant.name},  # no database but SQLite takes a NUL
    ).first()
    if row is None:
        raise NotFound(f"there is no session {session_id[:100]!r}", param="session_id")
    return row


def row_named(connection: Connection, tenant: Tenant, name: str) -> Row[tuple[object]] | None:
    """None for none of that name."""
    return connection.execute(
        text("SELECT * FROM sessions WHERE tenant = :tenant AND name = :name"), {"tenant": tenant.name, "name": name}
    ).first()


def opened(connection: Connection, tenant: Tenant, row: Row[tuple[object]]) -> tuple[OpenSession, list[Message]]:
    """The session with its context, and all that was said in it."""
    context = contexts.read(connection, tenant.name, row.context_digest)
    return OpenSession(**_facts(row), context=context), turns.messages_of(connection, tenant, row.head)


def check_head(row: Row[tuple[object]], head: str | AnyHead | None) -> None:
    """Raises Conflict when `head`, the last turn that the caller knows of, is not the last."""
    if not isinstance(head, AnyHead) and row.head != head:
        raise Conflict("the session has gone on while this request ran", param="session_id")


def as_session(row: Row[tuple[object]]) -> Session:
    return Session(**_facts(row))


def _facts(row: Row[tuple[object]]) -> dict[str, Any]:
    return {
        "session_id": row.session_id,
        "tenant": row.tenant,
        "name": row.name,
        "head": row.head,
        "n_messages": row.n_messages,
        "n_tokens": row.n_tokens,
        "created": row.created,
        "last_used": row.last_used,
        "pinned": bool(row.pinned),
        "parent": row.parent,
        "parent_messages": row.parent_messages,
        "metadata": json.loads(row.metadata),
        "counters": Counters(row.requests, row.prompt_tokens, row.cached_tokens, row.reply_tokens),
    }
