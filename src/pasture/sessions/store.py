"""Sessions: the conversations that the server keeps for a tenant.

A session points at its last turn (`turns`), so forking copies one row however long the conversation is, and truncating moves
a pointer. Every call names the tenant, and somebody else's session is the same as none: NotFound, with the same words. Unused
and outlived sessions are forgotten by `expiry`; a tenant has at most `max_sessions`. At that number, a new one takes the
place of the longest unused that requests only named (`go_on_named`) and nobody pinned; what somebody asked for stays. Any
thread may call; each call is one transaction.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum

from sqlalchemy import Connection, Row, text
from sqlalchemy.exc import IntegrityError

from pasture.core.errors import Conflict, NotFound, RateLimited, RequestError
from pasture.core.ports import Clock
from pasture.sessions import turns
from pasture.sessions.database import Database
from pasture.sessions.values import Counters, Message, Session, Tenant

MAX_NAME_CHARACTERS = 256
MAX_FORKS = 256
"""in one call"""


class AnyHead(Enum):
    """Whatever the session's last turn is."""

    ANY = "any"


ANY_HEAD = AnyHead.ANY

_INSERT = text(
    "INSERT INTO sessions VALUES (:id, :tenant, :name, :head, :n_messages, :n_tokens, :now, :now, 0, :parent, "
    ":parent_messages, :context, :metadata, 0, 0, 0, 0, :only_named)"
)


class Sessions:
    """The sessions in one database."""

    def __init__(self, database: Database, *, clock: Clock = time.time) -> None:
        self._database = database
        self._clock = clock

    def create(
        self,
        tenant: Tenant,
        messages: Sequence[Message] = (),
        *,
        name: str | None = None,
        context: Mapping[str, object] | None = None,
        metadata: Mapping[str, object] | None = None,
    ) -> Session:
        """A session that begins with `messages`. Raises Conflict for a name in use, RateLimited when there are too many."""
        if name is not None and not (0 < len(name) <= MAX_NAME_CHARACTERS and name.isprintable()):
            raise RequestError(f"a session's name has 1 to {MAX_NAME_CHARACTERS} printable characters", param="name")
        with self._database.write() as connection:
            _make_room(connection, tenant, 1)
            head = turns.branch(connection, tenant, None, messages)
            made = replace(
                _new(tenant, head, len(messages), self._clock()), name=name, context=context or {}, metadata=metadata or {}
            )
            try:
                connection.execute(_INSERT, _values(made))
            except IntegrityError:
                raise Conflict(f"there is a session named {name!r} already", param="name") from None
            if head is not None:
                turns.keep(connection, head)
            turns.check_room(connection, tenant)
        return made

    def get(self, tenant: Tenant, session_id: str) -> Session:
        """Raises NotFound."""
        with self._database.read() as connection:
            return _as_session(_row(connection, tenant, session_id))

    def page(self, tenant: Tenant, *, limit: int = 100, after: str | None = None) -> tuple[Session, ...]:
        """The tenant's sessions by id, from behind `after` on."""
        with self._database.read() as connection:
            rows = connection.execute(
                text("SELECT * FROM sessions WHERE tenant = :tenant AND session_id > :after ORDER BY session_id LIMIT :limit"),
                {"tenant": tenant.name, "after": (after or "").replace("\0", ""), "limit": limit},
            ).all()
        return tuple(_as_session(row) for row in rows)

    def pinned(self) -> tuple[Session, ...]:
        """Everybody's pinned sessions, last used first."""
        with self._database.read() as connection:
            rows = connection.execute(text("SELECT * FROM sessions WHERE pinned = 1 ORDER BY last_used DESC")).all()
        return tuple(_as_session(row) for row in rows)

    def recent(self, within_seconds: float, limit: int) -> tuple[Session, ...]:
        """Everybody's sessions that were used within so many seconds before now, last used first."""
        with self._database.read() as connection:
            rows = connection.execute(
                text("SELECT * FROM sessions WHERE last_used >= :since ORDER BY last_used DESC LIMIT :limit"),
                {"since": self._clock() - within_seconds, "limit": limit},
            ).all()
        return tuple(_as_session(row) for row in rows)

    def count(self, tenant: Tenant) -> int:
        with self._database.read() as connection:
            return _count(connection, tenant)

    def messages(self, tenant: Tenant, session_id: str) -> list[Message]:
        """All that was said. Raises NotFound."""
        return self.open(tenant, session_id)[1]

    def open(self, tenant: Tenant, session_id: str) -> tuple[Session, list[Message]]:
        """The session and all that was said in it. Raises NotFound."""
        with self._database.read() as connection:
            session = _as_session(_row(connection, tenant, session_id))
            return session, turns.messages_of(connection, tenant, session.head)

    def check_head(self, tenant: Tenant, session_id: str, head: str | AnyHead | None) -> None:
        """Raises NotFound, and Conflict when `head`, the last turn that the caller knows of, is not the last."""
        with self._database.read() as connection:
            _check_head(_row(connection, tenant, session_id), head)

    def check_room(self, tenant: Tenant, left: Sequence[Message], added: Sequence[Message]) -> None:
        """Raises RateLimited where `added` has no room even if all of `left` goes for it: known before there is a reply."""
        n_bytes = len(turns.encoded(added).encode()) - len(turns.encoded(left).encode())
        with self._database.read() as connection:
            if turns.excess_bytes(connection, tenant) + n_bytes > 0:
                raise turns.full(tenant)

    def advance(
        self,
        tenant: Tenant,
        session_id: str,
        messages: Sequence[Message],
        *,
        n_tokens: int,
        used: Counters,
        head: str | AnyHead | None = ANY_HEAD,
        context: Mapping[str, object] | None = None,
    ) -> None:
        """The conversation is `messages` now, the whole of it; `used` is added to the counters.

        `head`: the last turn that the caller knows of, or ANY_HEAD. Raises NotFound, RateLimited, and Conflict when the session
        has gone on meanwhile.
        """
        with self._database.write() as connection:
            row = _row(connection, tenant, session_id)
            _check_head(row, head)
            self._say(connection, tenant, row, messages, n_tokens)
            _count_use(connection, row, used, context)

    def go_on_named(
        self,
        tenant: Tenant,
        name: str,
        messages: Sequence[Message],
        *,
        n_tokens: int,
        used: Counters,
        context: Mapping[str, object] | None = None,
    ) -> str:
        """`advance` for the tenant's session of that name, which is made where there is none; returns its id.

        Raises RateLimited, and then none was made.
        """
        with self._database.write() as connection:
            row = connection.execute(
                text("SELECT * FROM sessions WHERE tenant = :tenant AND name = :name"), {"tenant": tenant.name, "name": name}
            ).first()
            if row is None:
                _make_room(connection, tenant, 1)
                made = replace(_new(tenant, None, 0, self._clock()), name=name)
                connection.execute(_INSERT, _values(made) | {"only_named": 1})
                row = _row(connection, tenant, made.session_id)
            self._say(connection, tenant, row, messages, n_tokens)
            _count_use(connection, row, used, context)
            return str(row.session_id)

    def fork(self, tenant: Tenant, session_id: str, n: int = 1) -> tuple[Session, ...]:
        """`n` sessions with the same past. Costs a row each. Raises NotFound, RateLimited."""
        if not 1 <= n <= MAX_FORKS:
            raise RequestError(f"n must be 1 to {MAX_FORKS}", param="n")
        with self._database.write() as connection:
            origin = _as_session(_row(connection, tenant, session_id))
            _make_room(connection, tenant, n, keep=session_id)
            now = self._clock()
            made = [
                replace(
                    _new(tenant, origin.head, origin.n_messages, now),
                    n_tokens=origin.n_tokens,
                    parent=session_id,
                    parent_messages=origin.n_messages,
                    context=origin.context,
                    metadata=origin.metadata,
                )
                for _ in range(n)
            ]
            connection.execute(_INSERT, [_values(session) for session in made])
            if origin.head is not None:
                turns.keep(connection, origin.head, n)
        return tuple(made)

    def copy(self, tenant: Tenant, session_id: str, target: Tenant) -> Session:
        """The conversation as a new session of another tenant, which shares nothing with this one. Raises NotFound."""
        session, messages = self.open(tenant, session_id)
        return self.create(target, messages, context=session.context, metadata=session.metadata)

    def truncate(self, tenant: Tenant, session_id: str, n_messages: int) -> Session:
        """Only the first `n_messages` were said. Raises NotFound, RequestError for more messages than there are."""
        with self._database.write() as connection:
            row = _row(connection, tenant, session_id)
            if not 0 <= n_messages <= row.n_messages:
                raise RequestError(f"the session has {row.n_messages} messages", param="messages")
            said = turns.messages_of(connection, tenant, row.head)[:n_messages]
            head = turns.branch(connection, tenant, row.head, said)
            self._point(connection, row, head, n_messages, 0)
            return _as_session(_row(connection, tenant, session_id))

    def pin(self, tenant: Tenant, session_id: str, pinned: bool) -> Session:
        """A pinned session does not expire. Raises NotFound, RateLimited when the tenant has pinned too many."""
        with self._database.write() as connection:
            row = _row(connection, tenant, session_id)
            if pinned and not row.pinned:
                found = connection.execute(
                    text("SELECT count(*) FROM sessions WHERE tenant = :tenant AND pinned = 1"), {"tenant": tenant.name}
                )
                if int(found.scalar_one()) >= tenant.limits.max_pinned:
                    raise RateLimited(
                        f"a tenant may pin {tenant.limits.max_pinned} sessions; unpin one",
                        retry_after_seconds=turns.FULL_RETRY_SECONDS,
                    )
            connection.execute(
                text("UPDATE sessions SET pinned = :pinned WHERE session_id = :id"), {"pinned": int(pinned), "id": session_id}
            )
            return _as_session(_row(connection, tenant, session_id))

    def delete(self, tenant: Tenant, session_id: str, head: str | AnyHead | None = ANY_HEAD) -> None:
        """Raises NotFound, and Conflict when `head`, the last turn that the caller knows of, is not the last."""
        with self._database.write() as connection:
            row = _row(connection, tenant, session_id)
            _check_head(row, head)
            forget(connection, row)

    def _say(
        self, connection: Connection, tenant: Tenant, row: Row[tuple[object]], messages: Sequence[Message], n_tokens: int
    ) -> None:
        """The conversation is `messages` now. Raises RateLimited."""
        head = turns.branch(connection, tenant, row.head, messages)
        self._point(connection, row, head, len(messages), n_tokens)
        turns.check_room(connection, tenant)

    def _point(self, connection: Connection, row: Row[tuple[object]], head: str | None, n_messages: int, n_tokens: int) -> None:
        if head is not None:
            turns.keep(connection, head)
        turns.let_go(connection, row.head)
        connection.execute(
            text(
                "UPDATE sessions SET head = :head, n_messages = :n, n_tokens = :tokens, last_used = :now WHERE session_id = :id"
            ),
            {"head": head, "n": n_messages, "tokens": n_tokens, "now": self._clock(), "id": row.session_id},
        )


def _count_use(connection: Connection, row: Row[tuple[object]], used: Counters, context: Mapping[str, object] | None) -> None:
    """Add to a session's counters; its context is another one now, where one is given."""
    values = {
        "id": row.session_id,
        "requests": used.requests,
        "prompt": used.prompt_tokens,
        "cached": used.cached_tokens,
        "reply": used.reply_tokens,
        "context": row.context if context is None else json.dumps(dict(context)),
    }
    connection.execute(
        text(
            "UPDATE sessions SET requests = requests + :requests, prompt_tokens = prompt_tokens + :prompt, "
            "cached_tokens = cached_tokens + :cached, reply_tokens = reply_tokens + :reply, context = :context "
            "WHERE session_id = :id"
        ),
        values,
    )


def _make_room(connection: Connection, tenant: Tenant, n: int, keep: str | None = None) -> None:
    """Forget as many as `n` new ones need of those that were only named, but for `keep`. Raises RateLimited for too few."""
    too_many = _count(connection, tenant) + n - tenant.limits.max_sessions
    if too_many <= 0:
        return
    oldest = text(
        "SELECT session_id, head FROM sessions WHERE tenant = :tenant AND only_named = 1 AND pinned = 0 "
        "ORDER BY last_used, session_id LIMIT :rows"
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


def forget(connection: Connection, row: Row[tuple[object]]) -> None:
    """Delete a session's row and what only it kept."""
    connection.execute(text("DELETE FROM sessions WHERE session_id = :id"), {"id": row.session_id})
    turns.let_go(connection, row.head)


def _new(tenant: Tenant, head: str | None, n_messages: int, now: float) -> Session:
    return Session(
        session_id="sess_" + secrets.token_hex(16),
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
        "context": json.dumps(dict(session.context)),
        "metadata": json.dumps(dict(session.metadata)),
        "only_named": 0,
    }


def _count(connection: Connection, tenant: Tenant) -> int:
    found = connection.execute(text("SELECT count(*) FROM sessions WHERE tenant = :tenant"), {"tenant": tenant.name})
    return int(found.scalar_one())


def _row(connection: Connection, tenant: Tenant, session_id: str) -> Row[tuple[object]]:
    row = connection.execute(
        text("SELECT * FROM sessions WHERE session_id = :id AND tenant = :tenant"),
        {"id": session_id.replace("\0", ""), "tenant": tenant.name},  # no database but SQLite takes a NUL
    ).first()
    if row is None:
        raise NotFound(f"there is no session {session_id[:100]!r}", param="session_id")
    return row


def _check_head(row: Row[tuple[object]], head: str | AnyHead | None) -> None:
    if not isinstance(head, AnyHead) and row.head != head:
        raise Conflict("the session has gone on while this request ran", param="session_id")


def _as_session(row: Row[tuple[object]]) -> Session:
    return Session(
        session_id=row.session_id,
        tenant=row.tenant,
        name=row.name,
        head=row.head,
        n_messages=row.n_messages,
        n_tokens=row.n_tokens,
        created=row.created,
        last_used=row.last_used,
        pinned=bool(row.pinned),
        parent=row.parent,
        parent_messages=row.parent_messages,
        context=json.loads(row.context),
        metadata=json.loads(row.metadata),
        counters=Counters(row.requests, row.prompt_tokens, row.cached_tokens, row.reply_tokens),
    )
