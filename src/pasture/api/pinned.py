"""Sessions whose KV stays in RAM: pinned now, or before the server was restarted.

    pin        slow tiers are asked, what there is comes to RAM and stays      go_on, cut   the pin follows its conversation
    started    what the state says is pinned is brought back, one session after another, while nobody waits for it

After a start no more than `RAM_SHARE` of the RAM budget is taken again, last used sessions first: with a smaller budget than
before, what is over stays pinned in the state (it does not expire) and comes back from disk like anything else. One for an app;
belongs to its event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from sqlalchemy.exc import SQLAlchemyError

from pasture.core.errors import NotFound, PastureError, RequestError
from pasture.core.ports import Service
from pasture.core.storage import Pin
from pasture.sessions.state import State
from pasture.sessions.values import Message, OpenSession, Session, Tenant

_log = logging.getLogger("pasture.api")

RAM_SHARE = 0.5
LIFT_SECONDS = 5.0
"""for which a caller waits until what slow tiers have of his session is in RAM"""

Tokens = Callable[[OpenSession, list[Message]], Awaitable[tuple[int, ...]]]
"""a conversation as the model reads it"""


class Pinned:
    """The pins of one app."""

    def __init__(self, service: Service, state: State, tokens: Tokens) -> None:
        self._service = service
        self._state = state
        self._tokens = tokens
        self._pins: dict[str, Pin | None] = {}
        """session -> what keeps its KV; None: it has none yet"""
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """How many sessions have KV that stays."""
        return sum(pin is not None for pin in self._pins.values())

    async def pin(self, tenant: Tenant, session_id: str) -> Session:
        """The session does not expire, and what there is of its KV stays in RAM. Raises NotFound, RateLimited."""
        session = await asyncio.to_thread(self._state.sessions.pin, tenant, session_id, True)
        await self._hold(tenant, session_id, LIFT_SECONDS)
        return session

    async def unpin(self, tenant: Tenant, session_id: str) -> Session:
        """Raises NotFound."""
        session = await asyncio.to_thread(self._state.sessions.pin, tenant, session_id, False)
        self.let_go(session_id)
        return session

    def let_go(self, session_id: str) -> None:
        """Nothing keeps the session's KV any more."""
        pin = self._pins.pop(session_id, None)
        if pin is not None:
            pin.release()

    def went_on(self, tenant: Tenant, session_id: str) -> None:
        """The conversation is longer now, or was cut; returns at once."""
        if session_id in self._pins:
            self._soon(self._renew(tenant, session_id))

    def started(self) -> None:
        """The server answers: bring back what was pinned; returns at once."""
        self._soon(self.bring_back())

    async def bring_back(self) -> None:
        """See the module. What cannot be had is said in the log and stays as it is."""
        try:
            found = await asyncio.to_thread(self._state.sessions.pinned)
        except (SQLAlchemyError, PastureError) as error:
            _log.warning("what is pinned cannot be read: %s", error)
            return
        for session in found:
            tenant = await asyncio.to_thread(self._state.tenant_named, session.tenant)
            if tenant is None or session.session_id in self._pins:
                continue
            if not self._room_for(session.n_tokens):
                _log.warning("RAM is too small for all that is pinned: %d sessions are in it", len(self))
                return
            try:
                await self._hold(tenant, session.session_id, None)
            except PastureError as error:
                _log.info("a pinned session is not brought back: %s", error)

    async def _renew(self, tenant: Tenant, session_id: str) -> None:
        with contextlib.suppress(PastureError):  # it is gone, or the server ends
            await self._hold(tenant, session_id, LIFT_SECONDS)

    async def _hold(self, tenant: Tenant, session_id: str, patience_seconds: float | None) -> None:
        """Pin what there is of a session, in place of what was pinned of it before."""
        session, messages = await asyncio.to_thread(self._state.sessions.open, tenant, session_id)
        try:
            tokens = await self._tokens(session, messages)
        except RequestError:  # this model's template refuses what was said to another
            tokens = ()
        pin = await self._pin(tenant, tokens, patience_seconds) if tokens else None
        self.let_go(session_id)
        self._pins[session_id] = pin
        with contextlib.suppress(NotFound):
            if (await asyncio.to_thread(self._state.sessions.get, tenant, session_id)).pinned:
                return
        self.let_go(session_id)  # unpinned or deleted meanwhile

    async def _pin(self, tenant: Tenant, tokens: tuple[int, ...], patience_seconds: float | None) -> Pin:
        namespace = tenant.namespace(self._state.share)
        self._service.allow(namespace, tenant.allowance(self._state.share))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_seconds):
                await self._service.prefetch(namespace, tokens)
        return await self._service.pin(namespace, tokens)

    def _room_for(self, n_tokens: int) -> bool:
        ram = next(iter(self._service.statistics().store.tiers), None)
        if ram is None:
            return False
        return ram.pinned_bytes + n_tokens * self._service.model.cell_bytes <= RAM_SHARE * ram.budget_bytes

    def _soon(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def settled(self) -> None:
        """Wait for what is under way in the background."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def close(self) -> None:
        """End what is under way; pins go with the service."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
