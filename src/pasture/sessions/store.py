"""Sessions: the conversations that the server keeps for a tenant.

A session points at its last turn (`turns`), so forking copies one row however long the conversation is, and truncating moves
a pointer. Every call names the tenant, and somebody else's session is the same as none: NotFound, with the same words. Unused
and outlived sessions are forgotten by `expiry`; a tenant has at most `max_sessions`. At that number, a new one takes the
place of the longest unused that requests only named (`go_on_named`) and nobody pinned; what somebody asked for stays. Any
thread may call; each call is one transaction.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sqlalchemy import Connection, Row, text
from sqlalchemy.exc import IntegrityError

from pasture.core.errors import Conflict, RateLimited, RequestError
from pasture.core.ports import Clock
from pasture.sessions import contexts, session_rows, turns
from pasture.sessions.database import Database
from pasture.sessions.session_rows import ANY_HEAD, AnyHead
from pasture.sessions.values import Counters, Message, OpenSession, Session, Tenant

MAX_NAME_CHARACTERS = 256
MAX_FORKS = 256
"""in one call"""


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
            session_rows.make_room(connection, tenant, 1)
            head = turns.branch(connection, tenant, None, messages)
            made = replace(session_rows.new(tenant, head, len(messages), self._clock()), name=name, metadata=metadata or {})
            try:
                session_rows.insert(connection, [made], contexts.keep(connection, tenant.name, context or {}))
            except IntegrityError:
                raise Conflict(f"there is a session named {name!r} already", param="name") from None
            if head is not None:
                turns.keep(connection, head)
            turns.check_room(connection, tenant)
        return made

    def get(self, tenant: Tenant, session_id: str) -> Session:
        """Raises NotFound."""
        with self._database.read() as connection:
            return session_rows.as_session(session_rows.row_of(connection, tenant, session_id))

    def page(self, tenant: Tenant, *, limit: int = 100, after: str | None = None) -> tuple[Session, ...]:
        """The tenant's sessions by id, from behind `after` on."""
        with self._database.read() as connection:
            rows = connection.execute(
                text("SELECT * FROM sessions WHERE tenant = :tenant AND session_id > :after ORDER BY session_id LIMIT :limit"),
                {"tenant": tenant.name, "after": (after or "").replace("\0", ""), "limit": limit},
            ).all()
        return tuple(session_rows.as_session(row) for row in rows)

    def pinned(self) -> tuple[Session, ...]:
        """Everybody's pinned sessions, last used first."""
        with self._database.read() as connection:
            rows = connection.execute(text("SELECT * FROM sessions WHERE pinned = 1 ORDER BY last_used DESC")).all()
        return tuple(session_rows.as_session(row) for row in rows)

    def recent(self, within_seconds: float, limit: int) -> tuple[Session, ...]:
        """Everybody's sessions that were used within so many seconds before now, last used first."""
        with self._database.read() as connection:
            rows = connection.execute(
                text("SELECT * FROM sessions WHERE last_used >= :since ORDER BY last_used DESC LIMIT :limit"),
                {"since": self._clock() - within_seconds, "limit": limit},
            ).all()
        return tuple(session_rows.as_session(row) for row in rows)

    def latest(self, limit: int, offset: int) -> tuple[Session, ...]:
        """Everybody's sessions, last used first, from the `offset`th on."""
        with self._database.read() as connection:
            rows = connection.execute(
                text("SELECT * FROM sessions ORDER BY last_used DESC, session_id LIMIT :limit OFFSET :offset"),
                {"limit": limit, "offset": offset},
            ).all()
        return tuple(session_rows.as_session(row) for row in rows)

    def total(self) -> int:
        """How many sessions there are, everybody's."""
        with self._database.read() as connection:
            return int(connection.execute(text("SELECT count(*) FROM sessions")).scalar_one())

    def count(self, tenant: Tenant) -> int:
        with self._database.read() as connection:
            return session_rows.count(connection, tenant)

    def messages(self, tenant: Tenant, session_id: str) -> list[Message]:
        """All that was said. Raises NotFound."""
        return self.open(tenant, session_id)[1]

    def open(self, tenant: Tenant, session_id: str) -> tuple[OpenSession, list[Message]]:
        """The session and all that was said in it. Raises NotFound."""
        with self._database.read() as connection:
            return session_rows.opened(connection, tenant, session_rows.row_of(connection, tenant, session_id))

    def open_named(self, tenant: Tenant, name: str) -> tuple[OpenSession, list[Message]] | None:
        """The same of the tenant's session of that name; None for none."""
        with self._database.read() as connection:
            row = session_rows.row_named(connection, tenant, name)
            return None if row is None else session_rows.opened(connection, tenant, row)

    def check_head(self, tenant: Tenant, session_id: str, head: str | AnyHead | None) -> None:
        """Raises NotFound, and Conflict when `head`, the last turn that the caller knows of, is not the last."""
        with self._database.read() as connection:
            session_rows.check_head(session_rows.row_of(connection, tenant, session_id), head)

    def check_room(
        self, tenant: Tenant, left: Sequence[Message], added: Sequence[Message], context: Mapping[str, object]
    ) -> None:
        """Raises RateLimited where `added` has no room even if all of `left` goes for it: known before there is a reply."""
        n_bytes = len(turns.encoded(added).encode()) - len(turns.encoded(left).encode())
        with self._database.read() as connection:
            n_bytes += contexts.new_bytes(connection, tenant.name, context)
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
            row = session_rows.row_of(connection, tenant, session_id)
            session_rows.check_head(row, head)
            self._say(connection, tenant, row, messages, n_tokens)
            session_rows.count_use(connection, row, used, context, only_named=False)
            turns.check_room(connection, tenant)

    def go_on_named(
        self,
        tenant: Tenant,
        name: str,
        messages: Sequence[Message],
        *,
        n_tokens: int,
        used: Counters,
        head: str | AnyHead | None = ANY_HEAD,
        context: Mapping[str, object] | None = None,
    ) -> str:
        """`advance` for the tenant's session of that name, which is made where there is none; returns its id.

        Who knows of a last turn, or that there is none, has asked for the session: it is no longer one that was only named.
        Raises Conflict, and RateLimited, and then none was made.
        """
        with self._database.write() as connection:
            row = session_rows.row_named(connection, tenant, name)
            if row is None:
                session_rows.make_room(connection, tenant, 1)
                made = replace(session_rows.new(tenant, None, 0, self._clock()), name=name)
                session_rows.insert(connection, [made], None, only_named=True)
                row = session_rows.row_of(connection, tenant, made.session_id)
            session_rows.check_head(row, head)
            self._say(connection, tenant, row, messages, n_tokens)
            only_named = bool(row.only_named) and isinstance(head, AnyHead)
            session_rows.count_use(connection, row, used, context, only_named=only_named)
            turns.check_room(connection, tenant)
            return str(row.session_id)

    def fork(self, tenant: Tenant, session_id: str, n: int = 1) -> tuple[Session, ...]:
        """`n` sessions with the same past. Costs a row each. Raises NotFound, RateLimited."""
        if not 1 <= n <= MAX_FORKS:
            raise RequestError(f"n must be 1 to {MAX_FORKS}", param="n")
        with self._database.write() as connection:
            row = session_rows.row_of(connection, tenant, session_id)
            origin = session_rows.as_session(row)
            session_rows.make_room(connection, tenant, n, keep=session_id)
            one = replace(
                session_rows.new(tenant, origin.head, origin.n_messages, self._clock()),
                n_tokens=origin.n_tokens,
                parent=session_id,
                parent_messages=origin.n_messages,
                metadata=origin.metadata,
            )
            made = [replace(one, session_id=session_rows.new_id()) for _ in range(n)]
            if row.context_digest is not None:
                contexts.keep_known(connection, tenant.name, row.context_digest, n)
            session_rows.insert(connection, made, row.context_digest)
            if origin.head is not None:
                turns.keep(connection, origin.head, n)
            turns.check_room(connection, tenant)
        return tuple(made)

    def copy(self, tenant: Tenant, session_id: str, target: Tenant) -> Session:
        """The conversation as a new session of another tenant, which shares nothing with this one. Raises NotFound."""
        session, messages = self.open(tenant, session_id)
        return self.create(target, messages, context=session.context, metadata=session.metadata)

    def truncate(self, tenant: Tenant, session_id: str, n_messages: int) -> Session:
        """Only the first `n_messages` were said. Raises NotFound, RequestError for more messages than there are."""
        with self._database.write() as connection:
            row = session_rows.row_of(connection, tenant, session_id)
            if not 0 <= n_messages <= row.n_messages:
                raise RequestError(f"the session has {row.n_messages} messages", param="messages")
            said = turns.messages_of(connection, tenant, row.head)[:n_messages]
            head = turns.branch(connection, tenant, row.head, said)
            self._point(connection, row, head, n_messages, 0)
            return session_rows.as_session(session_rows.row_of(connection, tenant, session_id))

    def pin(self, tenant: Tenant, session_id: str, pinned: bool) -> Session:
        """A pinned session does not expire. Raises NotFound, RateLimited when the tenant has pinned too many."""
        with self._database.write() as connection:
            row = session_rows.row_of(connection, tenant, session_id)
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
            return session_rows.as_session(session_rows.row_of(connection, tenant, session_id))

    def delete(self, tenant: Tenant, session_id: str, head: str | AnyHead | None = ANY_HEAD) -> None:
        """Raises NotFound, and Conflict when `head`, the last turn that the caller knows of, is not the last."""
        with self._database.write() as connection:
            row = session_rows.row_of(connection, tenant, session_id)
            session_rows.check_head(row, head)
            session_rows.forget(connection, row)

    def _say(
        self, connection: Connection, tenant: Tenant, row: Row[tuple[object]], messages: Sequence[Message], n_tokens: int
    ) -> None:
        """The conversation is `messages` now."""
        head = turns.branch(connection, tenant, row.head, messages)
        self._point(connection, row, head, len(messages), n_tokens)

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
