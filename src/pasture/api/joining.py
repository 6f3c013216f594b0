"""A chat request joins a session: what was said before comes from the server, and what is said now is kept there.

    session_id, X-Session-Id (an id)          a session the client made: it may send the new messages only
    X-Session-Id (a name), prompt_cache_key   a session that is made when first named: clients of this kind send everything,
                                              unless they say `session_mode` append (or auto), and with it ask for the session

Which of both a list of messages is can be said (`session_mode`); `auto` takes it for the whole conversation where it begins as
the session does, or holds replies of the assistant as only a whole one does. Where it begins with another system message and
holds no reply, nobody can tell, and the client is asked: taking it for the whole would forget what was said. A conversation
goes on only when a reply is complete: what was cut off leaves the session as it was. One request at a time may go on from a
session's end; the other one is told so (409). Whoever asked for a session hears that a reply cannot be kept, where possible
before there is one (429); whoever only named one gets the reply all the same.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace

from sqlalchemy.exc import SQLAlchemyError

from pasture.api.callers import Caller
from pasture.api.explanations import Past
from pasture.api.schemas import ChatBody
from pasture.core.errors import Conflict, RateLimited, RequestError
from pasture.core.values import Finish, FinishReason
from pasture.sessions.database import reason
from pasture.sessions.session_rows import ANY_HEAD, AnyHead
from pasture.sessions.store import MAX_NAME_CHARACTERS, Sessions
from pasture.sessions.values import Counters, Message, OpenSession, Tenant

_log = logging.getLogger("pasture.api")

SESSION_PREFIX = "sess_"
_OPENS = ("system", "developer")
CONTEXT_FIELDS = ("tools", "chat_template_kwargs")
"""fields of a request that its session remembers"""


@dataclass(frozen=True, slots=True)
class Joined:
    """A request's place in a session."""

    sessions: Sessions
    tenant: Tenant
    session_id: str | None
    """None: the session of that name, made when the reply is complete where there is none"""
    name: str | None
    messages: Sequence[Message]
    """the whole conversation, this request's messages included"""
    context: Mapping[str, object]
    head: str | AnyHead | None = ANY_HEAD
    past: Past | None = None
    """of a session that was there before"""

    @property
    def only_named(self) -> bool:
        """Whether nobody has asked for the session: the reply counts, and the session is kept where it can be."""
        return self.session_id is None and isinstance(self.head, AnyHead)

    async def go_on(self, reply: Message, finish: Finish) -> str | None:
        """`reply` is complete, and belongs to the conversation; returns the session's id. Raises Conflict, RateLimited."""
        if finish.reason is FinishReason.CANCELLED:
            return None
        messages = [*self.messages, reply]
        return await asyncio.to_thread(self._keep, messages, finish)

    def _keep(self, messages: Sequence[Message], finish: Finish) -> str | None:
        usage = finish.usage
        used = Counters(1, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)
        n_tokens = usage.prompt_tokens + usage.completion_tokens
        sessions, context = self.sessions, self.context
        if self.session_id is not None:
            sessions.advance(
                self.tenant, self.session_id, messages, n_tokens=n_tokens, used=used, head=self.head, context=context
            )
            return self.session_id
        assert self.name is not None
        try:
            return sessions.go_on_named(
                self.tenant, self.name, messages, n_tokens=n_tokens, used=used, head=self.head, context=context
            )
        except RateLimited as error:
            if not self.only_named:
                raise
            _log.info("a session that was only named is not kept: %s", error)
        except SQLAlchemyError as error:
            if not self.only_named:
                raise
            _log.warning("a session that was only named is not kept: %s", reason(error))
        return None


@dataclass(slots=True)
class Membership:
    """Which request is in which session."""

    sessions: Sessions
    _busy: set[str] = field(default_factory=set)

    async def join(self, body: ChatBody, caller: Caller, header: str | None) -> tuple[ChatBody, Joined | None]:
        """The request with its whole conversation, and its place.

        Raises NotFound, RateLimited where no reply could be kept, and RequestError for what cannot be meant.
        """
        session_id, name = _wanted(body, header)
        if session_id is None and name is None:
            if body.session_mode is not None:
                raise RequestError("session_mode needs a session_id", param="session_mode")
            return body, None
        if session_id is None and body.session_mode in (None, "replace"):
            context = _context(body, None)
            joined = Joined(self.sessions, caller.tenant, None, name, body.messages, context)
            return body.model_copy(update=context), joined
        if (body.n or 1) > 1:
            raise RequestError("a session goes on with one reply: n must be 1", param="n")
        session, said = await self._asked_for(caller.tenant, session_id, name)
        messages = whole(said, body.messages, body.session_mode or "auto")
        context = _context(body, session)
        edited_at = _edited_at(said, messages)
        since = len(said) if edited_at is None else edited_at
        added = [*messages[since:], {"role": "assistant", "content": ""}]
        await asyncio.to_thread(self.sessions.check_room, caller.tenant, said[since:], added, context)
        joined = Joined(self.sessions, caller.tenant, None, name, messages, context, head=None)
        if session is not None:
            past = Past(session.n_tokens, edited_at, template_changed=dict(session.context) != context)
            joined = replace(joined, session_id=session.session_id, head=session.head, past=past)
        return body.model_copy(update={"messages": messages, **context}), joined

    async def _asked_for(
        self, tenant: Tenant, session_id: str | None, name: str | None
    ) -> tuple[OpenSession | None, list[Message]]:
        """The session of that id, or of that name, of which there may be none yet. Raises NotFound for an id."""
        if session_id is not None:
            return await asyncio.to_thread(self.sessions.open, tenant, session_id)
        assert name is not None
        found = await asyncio.to_thread(self.sessions.open_named, tenant, name)
        return (None, []) if found is None else found

    @asynccontextmanager
    async def held(self, joined: Joined | None) -> AsyncIterator[None]:
        """Nobody else goes on from the request's session, or moves it, within the block.

        Raises Conflict when somebody does, or has done since the request joined, and NotFound when the session is gone.
        """
        if joined is None or joined.only_named:
            yield
            return
        if joined.session_id is None:
            with self.alone(f"{joined.tenant.name}/{joined.name}"):
                yield
            return
        with self.alone(joined.session_id):
            await asyncio.to_thread(self.sessions.check_head, joined.tenant, joined.session_id, joined.head)
            yield

    @contextmanager
    def alone(self, session_id: str) -> Iterator[None]:
        """Nobody else goes on from the session, or moves it, within the block. Raises Conflict when somebody does already."""
        if session_id in self._busy:
            raise Conflict("another request goes on from this session, or moves it; wait for it, or fork", param="session_id")
        self._busy.add(session_id)
        try:
            yield
        finally:
            self._busy.discard(session_id)


def whole(said: Sequence[Message], sent: Sequence[Message], mode: str) -> list[Message]:
    """The conversation that a client means who sends `sent` in a session where `said` was said."""
    if mode == "replace" or (mode == "auto" and _is_whole(said, sent)):
        return list(sent)
    return [*said, *sent]


def _is_whole(said: Sequence[Message], sent: Sequence[Message]) -> bool:
    if not said or not sent or list(sent[: len(said)]) == list(said) or (_has_reply(said) and _has_reply(sent)):
        return True
    if sent[0].get("role") not in _OPENS or said[0].get("role") not in _OPENS:
        return False
    if _has_reply(said) and sent[0] != said[0]:
        raise RequestError(
            "are these messages the whole conversation or the new ones? Their system message is not the session's: "
            "say session_mode 'replace' or 'append'",
            param="session_mode",
        )
    return True


def _edited_at(said: Sequence[Message], messages: Sequence[Message]) -> int | None:
    """The first message of what was said that is not as it was."""
    same = (one == two for one, two in zip(said, messages, strict=False))
    at = next((i for i, equal in enumerate(same) if not equal), len(messages))
    return at if at < len(said) else None


def _has_reply(messages: Sequence[Message]) -> bool:
    return any(message.get("role") == "assistant" for message in messages)


def _wanted(body: ChatBody, header: str | None) -> tuple[str | None, str | None]:
    """(session id, name), one of them at most."""
    if body.session_id is not None:
        return body.session_id, None
    if header is not None and header.startswith(SESSION_PREFIX):
        return header, None
    name = header or body.prompt_cache_key
    if name is not None and not (len(name) <= MAX_NAME_CHARACTERS and name.isprintable()):
        raise RequestError(f"a session's name has at most {MAX_NAME_CHARACTERS} printable characters", param="x-session-id")
    return None, name


def _context(body: ChatBody, session: OpenSession | None) -> dict[str, object]:
    """What the request says, else what its session remembers."""
    kept = {} if session is None else session.context
    found = {name: getattr(body, name) or kept.get(name) for name in CONTEXT_FIELDS}
    return {name: value for name, value in found.items() if value}
