"""After a start: what is public, and what was in use shortly before, is made ready while nobody asks.

A server that was ended properly finds its KV on disk, one that crashed finds what was written by then. What is missing is known
from the state: declared prefixes, and the conversations of sessions. Each is brought from disk as far as it is there and the
rest is computed. A prefix is a request of the lowest priority, which others go before. Conversations are computed as anything
that is done ahead: in steps of their own, never beside a request, the one used last first.
One for an app; belongs to its event loop.
"""

from __future__ import annotations

import asyncio
import logging

from sqlalchemy.exc import SQLAlchemyError

from pasture.api.jobs import Jobs
from pasture.api.publics import Publics
from pasture.core.errors import PastureError
from pasture.core.ports import Service
from pasture.sessions.state import State

_log = logging.getLogger("pasture.api")

RECENT_SECONDS = 900.0
"""before the start: who was there then may come back soon"""
MAX_SESSIONS = 32


class Repairs:
    """What is done once, after the start of one app."""

    def __init__(self, service: Service, state: State, jobs: Jobs, publics: Publics, *, sessions: bool) -> None:
        """`sessions`: conversations too, not only what is public."""
        self._service = service
        self._state = state
        self._jobs = jobs
        self._publics = publics
        self._sessions = sessions
        self._work: asyncio.Task[None] | None = None

    def started(self) -> None:
        """The server answers; returns at once."""
        self._work = asyncio.create_task(self.run())

    async def run(self) -> None:
        """See the module. What cannot be had is said in the log."""
        await self._publics.refresh()
        if not self._sessions:
            return
        try:
            recent = await asyncio.to_thread(self._state.sessions.recent, RECENT_SECONDS, MAX_SESSIONS)
            for found in reversed(recent):  # the last one expected is the first one done
                tenant = await asyncio.to_thread(self._state.tenant_named, found.tenant)
                if tenant is not None:
                    session, messages = await asyncio.to_thread(self._state.sessions.open, tenant, found.session_id)
                    tokens = await self._jobs.upcoming(messages, session.context)  # type: ignore[arg-type]  # JSON
                    namespace = tenant.namespace(self._state.share)
                    self._service.allow(namespace, tenant.allowance(self._state.share))
                    self._service.anticipate(namespace, tokens)
        except (SQLAlchemyError, PastureError) as error:
            _log.info("recent sessions are not made ready: %s", error)

    async def close(self) -> None:
        """End what is under way."""
        if self._work is not None:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)
