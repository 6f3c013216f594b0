"""Public prefixes: texts that the operator declares to be no secret, so that everybody may share their KV.

Declared as text, because tokens depend on the model; whoever builds prompts compares tokens. A declared text says nothing about
who uses it: only its own KV is shared, and what follows it in a prompt stays in the tenant's namespace. Any thread may call.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from pasture.core.errors import Conflict, NotFound, RequestError
from pasture.core.ports import Clock
from pasture.sessions.database import Database

MAX_BYTES = 8 << 20

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class PublicPrefix:
    """A text that everybody's prompts may begin with."""

    name: str
    content: str
    created: float
    role: str | None
    """whose message it is; None: the text is as the model reads it, from its first character on"""


class PublicPrefixes:
    """The declared prefixes in one database."""

    def __init__(self, database: Database, *, clock: Clock = time.time) -> None:
        self._database = database
        self._clock = clock

    def add(self, name: str, content: str, role: str | None = "system") -> PublicPrefix:
        """Raises Conflict for a name in use, RequestError for a name or a text that cannot be."""
        if not _NAME.fullmatch(name):
            raise RequestError(f"a public prefix's name is letters, digits, dots, dashes: not {name[:80]!r}")
        if not content or len(content.encode()) > MAX_BYTES:
            raise RequestError(f"a public prefix has 1 to {MAX_BYTES} bytes")
        now = self._clock()
        row = {"name": name, "content": content, "now": now, "role": role}
        try:
            with self._database.write() as connection:
                connection.execute(text("INSERT INTO public_prefixes VALUES (:name, :content, :now, :role)"), row)
        except IntegrityError:
            raise Conflict(f"there is a public prefix {name} already") from None
        return PublicPrefix(name, content, now, role)

    def all(self) -> tuple[PublicPrefix, ...]:
        with self._database.read() as connection:
            rows = connection.execute(text("SELECT name, content, created, role FROM public_prefixes ORDER BY name")).all()
        return tuple(PublicPrefix(*row) for row in rows)

    def remove(self, name: str) -> None:
        """Raises NotFound."""
        with self._database.write() as connection:
            if not connection.execute(text("DELETE FROM public_prefixes WHERE name = :name"), {"name": name}).rowcount:
                raise NotFound(f"there is no public prefix {name[:100]!r}")
