"""Everybody's sessions as the operator sees them: their numbers, and where each one's KV is. Nothing of what was said in them.

Made when somebody asks, a page at a time: to know where a conversation is, it is rendered and tokenised anew. Event loop.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict

from pydantic import ValidationError

from pasture.api.gateway import Gateway
from pasture.core.errors import NotFound, RequestError
from pasture.core.values import Namespace, Whereabouts
from pasture.sessions.values import Message, OpenSession, Session

Json = dict[str, object]

MAX_PAGE = 50
_AT_ONCE = 8
"""in memory, and asked about at the same time: slow tiers answer on threads that everybody needs"""

_Opened = tuple[Namespace, OpenSession, list[Message]]
"""a session with all that its prompt is made from, and in which namespace"""


async def overview(gateway: Gateway, limit: int, offset: int) -> Json:
    """A page of everybody's sessions, last used first, and how many there are."""
    sessions = gateway.state.sessions
    total, found = await asyncio.to_thread(lambda: (sessions.total(), sessions.latest(limit, offset)))
    places = asyncio.Semaphore(_AT_ONCE)

    async def row(session: Session) -> Json | None:
        async with places:
            try:
                opened = await asyncio.to_thread(_open, gateway, session)
            except NotFound:  # forgotten meanwhile
                return None
            n_tokens, where = (session.n_tokens, None) if opened is None else await _locate(gateway, *opened)
        return _row(session, gateway.state.now(), n_tokens, where)

    rows = await asyncio.gather(*map(row, found))
    return {"object": "list", "data": [one for one in rows if one is not None], "total": total}


def _open(gateway: Gateway, session: Session) -> _Opened | None:
    """None for what is a tenant's whom this server does not know any more. Raises NotFound. On a worker thread."""
    state = gateway.state
    tenant = state.tenant_named(session.tenant)
    if tenant is None:
        return None
    return tenant.namespace(state.share), *state.sessions.open(tenant, session.session_id)


async def _locate(
    gateway: Gateway, namespace: Namespace, session: OpenSession, messages: list[Message]
) -> tuple[int, Whereabouts | None]:
    """How many tokens it has, and where they are; None where nobody can say."""
    try:
        tokens = await gateway.session_tokens(session, messages)
        return len(tokens), await gateway.service.locate(namespace, tokens, deep=True)
    except (RequestError, ValidationError):  # what was said is none of this model's, or too much of it; or there is no replica
        return session.n_tokens, None


def _row(session: Session, now: float, n_tokens: int, found: Whereabouts | None) -> Json:
    return {
        "id": session.session_id,
        "tenant": session.tenant,
        "name": session.name,
        "pinned": session.pinned,
        "idle_seconds": round(max(0.0, now - session.last_used), 3),
        "n_messages": session.n_messages,
        "n_tokens": n_tokens,
        "usage": asdict(session.counters),
        "tiers": None if found is None else {"live": found.live_tokens, "ram": found.ram_tokens, **found.slow_tokens},
    }
