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

MIGRATIONS: tuple[tuple[str, ...], ...] = (_FIRST, _ROLES, _ONLY_NAMED)
