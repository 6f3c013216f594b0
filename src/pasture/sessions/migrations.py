"""The schema as a list of steps that is only ever appended to. Portable SQL: no types or functions of one database alone."""

from __future__ import annotations

_FIRST = (
    """CREATE TABLE tenants (
        name TEXT PRIMARY KEY, salt TEXT NOT NULL, limits TEXT NOT NULL, created DOUBLE PRECISION NOT NULL)""",
    """CREATE TABLE api_keys (
        key_id TEXT PRIMARY KEY, digest TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, label TEXT NOT NULL,
        created DOUBLE PRECISION NOT NULL, revoked DOUBLE PRECISION)""",
    """CREATE TABLE turns (
        turn_id TEXT PRIMARY KEY, tenant TEXT NOT NULL, parent TEXT, n_messages INTEGER NOT NULL,
        messages TEXT NOT NULL, n_bytes BIGINT NOT NULL, refs INTEGER NOT NULL)""",
    "CREATE INDEX turns_tenant ON turns (tenant)",
    "CREATE TABLE stored (tenant TEXT PRIMARY KEY, n_bytes BIGINT NOT NULL)",
    """CREATE TABLE sessions (
        session_id TEXT PRIMARY KEY, tenant TEXT NOT NULL, name TEXT, head TEXT, n_messages INTEGER NOT NULL,
        n_tokens BIGINT NOT NULL, created DOUBLE PRECISION NOT NULL, last_used DOUBLE PRECISION NOT NULL,
        pinned INTEGER NOT NULL, parent TEXT, parent_messages INTEGER NOT NULL, context TEXT NOT NULL, metadata TEXT NOT NULL,
        requests BIGINT NOT NULL, prompt_tokens BIGINT NOT NULL, cached_tokens BIGINT NOT NULL, reply_tokens BIGINT NOT NULL,
        UNIQUE (tenant, name))""",
    "CREATE INDEX sessions_used ON sessions (tenant, last_used)",
    """CREATE TABLE responses (
        response_id TEXT PRIMARY KEY, tenant TEXT NOT NULL, head TEXT NOT NULL, created DOUBLE PRECISION NOT NULL,
        last_used DOUBLE PRECISION NOT NULL, body TEXT NOT NULL, n_bytes BIGINT NOT NULL)""",
    "CREATE INDEX responses_used ON responses (tenant, last_used)",
    """CREATE TABLE public_prefixes (
        name TEXT PRIMARY KEY, content TEXT NOT NULL, created DOUBLE PRECISION NOT NULL)""",
)

_ROLES = ("ALTER TABLE public_prefixes ADD COLUMN role TEXT",)

_ONLY_NAMED = ("ALTER TABLE sessions ADD COLUMN only_named INTEGER NOT NULL DEFAULT 0",)

_CONTEXTS = (
    """CREATE TABLE contexts (
        tenant TEXT NOT NULL, digest TEXT NOT NULL, body TEXT NOT NULL, n_bytes BIGINT NOT NULL, refs INTEGER NOT NULL,
        PRIMARY KEY (tenant, digest))""",
    "ALTER TABLE sessions ADD COLUMN context_digest TEXT",
    # no database has a digest that others have too: an id is as unique, and what is said next has the context filed anew
    "UPDATE sessions SET context_digest = session_id WHERE context <> '{}'",
    """INSERT INTO contexts SELECT tenant, context_digest, context, length(context), 1 FROM sessions
        WHERE context_digest IS NOT NULL""",
    "ALTER TABLE sessions DROP COLUMN context",
    "INSERT INTO stored SELECT DISTINCT tenant, 0 FROM sessions WHERE tenant NOT IN (SELECT tenant FROM stored)",
    """UPDATE stored SET n_bytes = n_bytes
        + (SELECT coalesce(sum(c.n_bytes), 0) FROM contexts c WHERE c.tenant = stored.tenant)
        + (SELECT coalesce(sum(length(s.metadata)), 0) FROM sessions s WHERE s.tenant = stored.tenant)""",
)

MIGRATIONS: tuple[tuple[str, ...], ...] = (_FIRST, _ROLES, _ONLY_NAMED, _CONTEXTS)
