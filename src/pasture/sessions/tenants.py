"""Tenants and their API keys.

A key is 32 random bytes; only its SHA-256 is kept, so whoever reads the database has no key. (A slow hash would protect weak
passwords; nobody guesses 256 bits.) Keys that the operator wrote into flags or a file are taken as they are, each a tenant of
its own whose salt follows from the key. A server that has ever had keys stays closed when the last one is revoked.

Looking up a key asks the database at most every `FRESH_SECONDS` a key: so long does a revoked key go on working.
"""

from __future__ import annotations

import json
import logging
import math
import re
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from hashlib import blake2b, sha256
from hmac import compare_digest

from sqlalchemy import Connection, Row, text
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from pasture.core.errors import Conflict, NotFound, RequestError
from pasture.core.ports import Clock
from pasture.sessions.database import Database
from pasture.sessions.values import Key, Limits, Tenant

_log = logging.getLogger("pasture.sessions")

KEY_PREFIX = "pasture-"
FRESH_SECONDS = 2.0
MAX_REMEMBERED = 4096
"""keys whose tenant is remembered between requests"""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LIMIT_NAMES = {item.name for item in fields(Limits)}
_OPTIONAL = {"max_concurrent", "tokens_per_minute", "max_live_cells", "max_ram_bytes", "max_disk_bytes", "guaranteed_share"}
_BOUNDS = {"guaranteed_share": (0, 1), "max_priority": (-1, 1)}


class Tenants:
    """Tenants and keys in one database; any thread may call."""

    def __init__(self, database: Database, limits: Limits | None = None, *, clock: Clock = time.time) -> None:
        """`limits`: of a tenant that has none of its own."""
        self._database = database
        self.usual = limits or Limits()
        self._clock = clock

    def create(self, name: str, **limits: float | int | None) -> Tenant:
        """A new tenant with a salt of its own. Raises Conflict for a name in use, RequestError for a bad one."""
        if not _NAME.fullmatch(name):
            raise RequestError(f"a tenant's name is letters, digits, dots, dashes: not {name[:80]!r}")
        tenant = Tenant(name, secrets.token_bytes(32), with_limits(self.usual, limits))
        row = {"name": name, "salt": tenant.salt.hex(), "limits": json.dumps(limits), "created": self._clock()}
        try:
            with self._database.write() as connection:
                connection.execute(text("INSERT INTO tenants VALUES (:name, :salt, :limits, :created)"), row)
        except IntegrityError:
            raise Conflict(f"there is a tenant {name} already") from None
        return tenant

    def get(self, name: str) -> Tenant:
        """Raises NotFound."""
        with self._database.read() as connection:
            return self._as_tenant(_row(connection, name))

    def all(self) -> tuple[Tenant, ...]:
        with self._database.read() as connection:
            rows = connection.execute(text("SELECT name, salt, limits FROM tenants ORDER BY name")).all()
        return tuple(self._as_tenant(row) for row in rows)

    def with_own(self, limit: str) -> tuple[Tenant, ...]:
        """Those to whom somebody has given this limit."""
        with self._database.read() as connection:
            rows = connection.execute(text("SELECT name, salt, limits FROM tenants ORDER BY name")).all()
        return tuple(self._as_tenant(row) for row in rows if limit in json.loads(row.limits))

    def limit(self, name: str, **limits: float | int | None) -> Tenant:
        """Change some of a tenant's limits. Raises NotFound, or RequestError for a limit that cannot be."""
        with self._database.write() as connection:
            row = _row(connection, name)
            own = json.loads(row.limits) | limits
            tenant = Tenant(name, bytes.fromhex(row.salt), with_limits(self.usual, own))
            values = {"name": name, "limits": json.dumps(own)}
            connection.execute(text("UPDATE tenants SET limits = :limits WHERE name = :name"), values)
        return tenant

    def add_key(self, tenant: str, label: str = "") -> tuple[str, Key]:
        """A new key for a tenant, which is made if there is none. The key itself is shown this once and kept nowhere."""
        with self._database.read() as connection:
            known = connection.execute(text("SELECT 1 FROM tenants WHERE name = :name"), {"name": tenant}).first()
        if known is None:
            self.create(tenant)
        secret = KEY_PREFIX + secrets.token_urlsafe(32)
        key = Key(secrets.token_hex(6), tenant, label, self._clock())
        row = {"key_id": key.key_id, "digest": digest(secret.encode()), "tenant": tenant, "label": label, "now": key.created}
        with self._database.write() as connection:
            connection.execute(text("INSERT INTO api_keys VALUES (:key_id, :digest, :tenant, :label, :now, NULL)"), row)
        return secret, key

    def all_keys(self) -> tuple[Key, ...]:
        """All, revoked ones too, oldest first."""
        with self._database.read() as connection:
            rows = connection.execute(
                text("SELECT key_id, tenant, label, created, revoked FROM api_keys ORDER BY created, key_id")
            ).all()
        return tuple(Key(*row) for row in rows)

    def revoke(self, key_id: str) -> None:
        """The key opens nothing any more. Raises NotFound; revoking twice is no error."""
        row = {"key_id": key_id, "now": self._clock()}
        with self._database.write() as connection:
            found = connection.execute(
                text("UPDATE api_keys SET revoked = coalesce(revoked, :now) WHERE key_id = :key_id"), row
            )
            if not found.rowcount:
                raise NotFound(f"there is no key {key_id}")

    def of_digest(self, key_digest: str) -> Tenant | None:
        """The tenant that a key with this digest belongs to; None for an unknown or revoked one."""
        with self._database.read() as connection:
            row = connection.execute(
                text(
                    "SELECT t.name, t.salt, t.limits, k.digest FROM api_keys k JOIN tenants t ON t.name = k.tenant "
                    "WHERE k.digest = :digest AND k.revoked IS NULL"
                ),
                {"digest": key_digest},
            ).first()
        if row is None or not compare_digest(row.digest, key_digest):
            return None
        return self._as_tenant(row)

    def has_keys(self) -> bool:
        """Whether a key was ever made, revoked or not."""
        with self._database.read() as connection:
            return connection.execute(text("SELECT 1 FROM api_keys LIMIT 1")).first() is not None

    def _as_tenant(self, row: Row[tuple[object]]) -> Tenant:
        own = {key: value for key, value in json.loads(row.limits).items() if key in _LIMIT_NAMES}
        return Tenant(row.name, bytes.fromhex(row.salt), replace(self.usual, **own))


class Keyring:
    """Who a presented key belongs to: keys from the settings, then those of the database, remembered for a moment."""

    def __init__(self, tenants: Tenants, keys: Sequence[str] = (), *, clock: Clock = time.monotonic) -> None:
        self._tenants = tenants
        self._written = [(sha256(key.encode()).digest(), _written_tenant(key, tenants.usual)) for key in keys]
        self._clock = clock
        self._lock = threading.Lock()
        self._asking = threading.Lock()
        self._known: dict[str, tuple[float, Tenant]] = {}
        self._closed: bool | None = True if self._written else None
        """whether a key is needed; a server that has had keys stays closed. None: the database was never asked"""
        self._asked = -math.inf

    def known_closed(self) -> bool | None:
        """Whether a key is needed at all, where that is known without the database."""
        return self._closed if self._closed or self._clock() - self._asked < FRESH_SECONDS else None

    def closed(self) -> bool:
        """Whether a key is needed at all. May ask the database; while that does not answer, what it said before holds."""
        with self._asking:
            known = self.known_closed()
            if known is not None:
                return known
            try:
                self._closed = self._tenants.has_keys()
            except SQLAlchemyError as error:
                if self._closed is None:
                    raise
                _log.warning("whether there are keys cannot be asked now: %s", error)
            self._asked = self._clock()
            return self._closed

    def written(self, name: str) -> Tenant | None:
        """The tenant of a key from the settings, by its name."""
        return next((tenant for _, tenant in self._written if tenant.name == name), None)

    def remembered(self, key: bytes) -> Tenant | None:
        """The tenant, where that is known without the database."""
        presented = sha256(key).digest()
        found = None
        for known, tenant in self._written:  # all of them, so that the time says nothing about which one was close
            if compare_digest(known, presented):
                found = tenant
        if found is not None:
            return found
        entry = self._known.get(presented.hex())
        return entry[1] if entry is not None and self._clock() - entry[0] < FRESH_SECONDS else None

    def find(self, key: bytes) -> Tenant | None:
        """The tenant of a key, or None. May ask the database."""
        tenant = self.remembered(key)
        if tenant is not None:
            return tenant
        name = digest(key)
        tenant = self._tenants.of_digest(name)
        with self._lock:
            self._known.pop(name, None)
            if tenant is not None:
                while len(self._known) >= MAX_REMEMBERED:
                    del self._known[next(iter(self._known))]
                self._known[name] = self._clock(), tenant
        return tenant


def digest(key: bytes) -> str:
    """What is kept of a key."""
    return sha256(key).hexdigest()


def with_limits(limits: Limits, changes: dict[str, float | int | None]) -> Limits:
    """Limits with some replaced. Raises RequestError for an unknown one, or one that makes no sense."""
    for name, value in changes.items():
        if name not in _LIMIT_NAMES:
            raise RequestError(f"there is no limit {name}")
        if value is None:
            if name not in _OPTIONAL:
                raise RequestError(f"{name} cannot be without a limit")
        elif not math.isfinite(value):
            raise RequestError(f"{name} must be a number; leave it out where there should be no limit")
        elif name in _BOUNDS:
            least, most = _BOUNDS[name]
            if not least <= value <= most:
                raise RequestError(f"{name} is a number from {least} to {most}")
        elif value < 0 or (value == 0 and (name in _OPTIONAL or name == "weight")):
            raise RequestError(f"{name} must be greater than 0")
    return replace(limits, **changes)  # type: ignore[arg-type]  # numbers all, checked above


def _written_tenant(key: str, limits: Limits) -> Tenant:
    salt = blake2b(key.encode(), digest_size=32, person=b"pasture-salt").digest()
    return Tenant(f"key-{sha256(salt).hexdigest()[:12]}", salt, limits)


def _row(connection: Connection, name: str) -> Row[tuple[object]]:
    row = connection.execute(text("SELECT name, salt, limits FROM tenants WHERE name = :name"), {"name": name}).first()
    if row is None:
        raise NotFound(f"there is no tenant {name[:80]!r}")
    return row
