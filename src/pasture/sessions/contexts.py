"""Contexts: what the prompts of sessions are made from besides what was said (tools, template variables).

Tools are long, and most sessions of a tenant have the same ones: a tenant has each context once, under its digest, however many
sessions have it. A context counts them, counts among the bytes that its tenant stores, and goes with the last of them. All
functions work inside a transaction of their caller and see one tenant's contexts only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b

from sqlalchemy import Connection, text

from pasture.sessions import turns


def keep(connection: Connection, tenant: str, context: Mapping[str, object], by: int = 1) -> str | None:
    """So many more sessions have this context; returns its digest, None for an empty one."""
    if not context:
        return None
    body = _encoded(context)
    digest = _digest(body)
    if not keep_known(connection, tenant, digest, by):
        n_bytes = len(body.encode())
        row = {"tenant": tenant, "digest": digest, "body": body, "bytes": n_bytes, "by": by}
        connection.execute(text("INSERT INTO contexts VALUES (:tenant, :digest, :body, :bytes, :by)"), row)
        turns.count_bytes(connection, tenant, n_bytes)
    return digest


def keep_known(connection: Connection, tenant: str, digest: str, by: int = 1) -> bool:
    """So many more sessions have the context of this digest; False where there is none."""
    more = text("UPDATE contexts SET refs = refs + :by WHERE tenant = :tenant AND digest = :digest")
    return connection.execute(more, {"tenant": tenant, "digest": digest, "by": by}).rowcount > 0


def let_go(connection: Connection, tenant: str, digest: str | None, by: int = 1) -> None:
    """So many sessions fewer have it; without any, it goes."""
    if digest is None:
        return
    named = {"tenant": tenant, "digest": digest}
    fewer = text("UPDATE contexts SET refs = refs - :by WHERE tenant = :tenant AND digest = :digest RETURNING refs, n_bytes")
    row = connection.execute(fewer, named | {"by": by}).one()
    if row.refs == 0:
        connection.execute(text("DELETE FROM contexts WHERE tenant = :tenant AND digest = :digest"), named)
        turns.count_bytes(connection, tenant, -row.n_bytes)


def read(connection: Connection, tenant: str, digest: str | None) -> dict[str, object]:
    """The context of this digest."""
    if digest is None:
        return {}
    found = connection.execute(
        text("SELECT body FROM contexts WHERE tenant = :tenant AND digest = :digest"), {"tenant": tenant, "digest": digest}
    )
    return dict(json.loads(found.scalar_one()))


def new_bytes(connection: Connection, tenant: str, context: Mapping[str, object]) -> int:
    """How many bytes more the tenant stores once a session has this context."""
    if not context:
        return 0
    body = _encoded(context)
    found = connection.execute(
        text("SELECT 1 FROM contexts WHERE tenant = :tenant AND digest = :digest"), {"tenant": tenant, "digest": _digest(body)}
    )
    return len(body.encode()) if found.first() is None else 0


def _encoded(context: Mapping[str, object]) -> str:
    """As it is stored. In the order that it came in: templates show it so."""
    return json.dumps(dict(context), ensure_ascii=False, separators=(",", ":"))


def _digest(body: str) -> str:
    return blake2b(body.encode(), digest_size=32).hexdigest()
