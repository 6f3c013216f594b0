"""What the session routes do beyond the database: tokens, KV, files. One for an app; belongs to its event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from hashlib import sha256

from pydantic import ValidationError

from pasture.api import peers
from pasture.api.callers import Caller
from pasture.api.errors import explain
from pasture.api.gateway import Gateway
from pasture.api.session_schemas import Json, NewSession, TargetBody, describe, describe_cache
from pasture.core.errors import Conflict, NotFound, RateLimited, RequestError
from pasture.core.ports import Movable, Service
from pasture.core.values import ModelInfo
from pasture.sessions import portable
from pasture.sessions.values import Message, OpenSession, Session, Tenant

MAX_TRAVELLING, MAX_TRAVELLING_OF_TENANT = 4, 2
"""files of sessions in memory at once"""
MAX_SENDING = 2
"""to other servers, which may be slow: each takes one of the threads that everybody needs"""
TRAVEL_PATIENCE_SECONDS = 40.0
"""of those who wait for a place; what they send stays unread meanwhile. Longer than who sends nothing can keep one"""
TRAVEL_RETRY_SECONDS = 5.0
PREFETCH_SECONDS = 5.0
"""for which an answer waits for what is lifted into RAM"""


class Keepers:
    """Sessions of one app with what the service has of them."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._sessions = gateway.state.sessions
        self._sending = asyncio.Semaphore(MAX_SENDING)
        self._travelling = asyncio.Semaphore(MAX_TRAVELLING)
        self._travelling_of = defaultdict[str, asyncio.Semaphore](lambda: asyncio.Semaphore(MAX_TRAVELLING_OF_TENANT))

    @contextlib.asynccontextmanager
    async def _one_more(self, caller: Caller) -> AsyncIterator[None]:
        """Hold a session's file, a GiB and more, within the block. Raises RateLimited after a long wait for a place."""
        async with contextlib.AsyncExitStack() as places:
            try:
                async with asyncio.timeout(TRAVEL_PATIENCE_SECONDS):
                    await places.enter_async_context(self._travelling_of[caller.tenant.name])
                    await places.enter_async_context(self._travelling)
            except TimeoutError:
                message = "other sessions are being imported or exported; try again when they are done"
                raise RateLimited(message, retry_after_seconds=TRAVEL_RETRY_SECONDS) from None
            yield

    async def tokens(self, session: OpenSession, messages: list[Message]) -> tuple[int, ...]:
        """The conversation as the model reads it."""
        return await self._gateway.session_tokens(session, messages)

    async def show(self, caller: Caller, session_id: str) -> tuple[Json, list[Message]]:
        """A session with where its KV is, and its messages. Raises NotFound."""
        session, messages = await asyncio.to_thread(self._sessions.open, caller.tenant, session_id)
        shown = self.describe(caller.tenant, session)
        try:
            tokens = await self.tokens(session, messages)
        except RequestError:  # this model's template refuses what was said to another
            return shown, messages
        found = await self._service.locate(caller.namespace, tokens, deep=True)
        return shown | {"cache": describe_cache(found, len(tokens), self._service.model.cell_bytes)}, messages

    def describe(self, tenant: Tenant, session: Session) -> Json:
        limits = tenant.limits
        return describe(
            session,
            self._gateway.state.now(),
            idle_seconds=limits.idle_seconds,
            lifetime_seconds=limits.lifetime_seconds,
        )

    async def prefetch(self, caller: Caller, session_id: str, *, live: bool) -> Json:
        """Bring a session's KV into the live cache, from a tier or computed; not `live`: into RAM what slower tiers have of it.

        Raises NotFound.
        """
        session, messages = await asyncio.to_thread(self._sessions.open, caller.tenant, session_id)
        tokens = await self.tokens(session, messages)
        cached = 0
        if tokens:
            cached = await (self._to_live(caller, tokens) if live else self._to_ram(caller, tokens))
        return {"id": session_id, "object": "session.prefetch", "tokens": len(tokens), "cached_tokens": cached}

    async def _to_live(self, caller: Caller, tokens: tuple[int, ...]) -> int:
        """Returns how many tokens did not have to be computed. Raises what ended it early."""
        request, cached = self._gateway.jobs.prefill(tokens, caller), 0
        async with (
            self._gateway.state.gate.enter(caller.tenant, tokens=len(tokens)) as passage,
            aclosing(self._service.generate(request)) as events,
        ):
            async for event in events:
                if event.finish is not None:
                    cached = event.finish.usage.cached_tokens
                    passage.pay(len(tokens) - cached)
                    if event.finish.error is not None:
                        raise event.finish.error
        return cached

    async def _to_ram(self, caller: Caller, tokens: tuple[int, ...]) -> int:
        """Returns how many tokens are in RAM or live now; what real work keeps waiting goes on in the background."""
        self._service.allow(caller.namespace, caller.allowance)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._service.prefetch(caller.namespace, tokens), PREFETCH_SECONDS)
        found = await self._service.locate(caller.namespace, tokens)
        return max(found.live_tokens, found.ram_tokens)

    async def truncate(self, caller: Caller, session_id: str, messages: int | None, tokens: int | None) -> Session:
        """Keep so many messages, or as many as fit into so many tokens. Raises NotFound, RequestError."""
        if (messages is None) == (tokens is None):
            raise RequestError("give either messages or tokens", param="messages")
        if messages is None:
            assert tokens is not None
            messages = await self._messages_within(caller, session_id, tokens)
        return await asyncio.to_thread(self._sessions.truncate, caller.tenant, session_id, messages)

    @contextlib.asynccontextmanager
    async def export(self, caller: Caller, session_id: str, *, blocks: bool) -> AsyncIterator[bytes]:
        """The session as one file, which is in memory, and counts, within the block. Raises NotFound, RateLimited."""
        session, messages = await asyncio.to_thread(self._sessions.open, caller.tenant, session_id)
        tokens = await self.tokens(session, messages)
        async with self._one_more(caller):
            yield await self._dump(caller, session, messages, tokens, blocks=blocks)

    async def _dump(
        self, caller: Caller, session: OpenSession, messages: list[Message], tokens: tuple[int, ...], *, blocks: bool
    ) -> bytes:
        exported = await self._service.export(caller.namespace, tokens) if blocks and tokens else b""
        model = model_id(self._service.model)
        file = portable.Portable(model, messages, tokens, exported, session.context, session.metadata)
        return await asyncio.to_thread(portable.dump, file)

    async def carry(self, caller: Caller, session_id: str, replica: str) -> Json:
        """Have a session's KV on another replica of the cluster. Raises NotFound, Conflict, RequestError, NoReplica."""
        if not isinstance(self._service, Movable):
            raise RequestError("this server is one machine: there is no replica to move to", param="replica")
        session, messages = await asyncio.to_thread(self._sessions.open, caller.tenant, session_id)
        tokens = await self.tokens(session, messages)
        names = [session_id] if session.name is None else [session_id, session.name]
        n_carried = await self._service.move(caller.namespace, tokens, names, replica)
        found: Json = {"id": session_id, "object": "session.carried", "replica": replica}
        return found | {"tokens": len(tokens), "carried_tokens": n_carried}

    async def copy(self, caller: Caller, session_id: str, to: TargetBody) -> Json:
        """The session as another tenant's, here or at a peer. Raises RequestError and its kinds, and PeerFailed."""
        if to.peer is not None:
            return await self._send(caller, session_id, to.peer, to.target_key)
        if to.target_key is None:
            raise RequestError("whose shall it be? give target_key, peer, or both", param="target_key")
        target = await self._target(to.target_key)
        made = await asyncio.to_thread(self._sessions.copy, caller.tenant, session_id, target)
        return self.describe(target, made)

    async def move(self, caller: Caller, session_id: str, to: TargetBody) -> Json:
        """`copy`, and the session is gone from here; meanwhile nobody goes on from it.

        Raises Conflict when somebody does already, and when it is another one at the end (truncated, or gone on with at a
        server that has the same state): then nothing is deleted.
        """
        session = await asyncio.to_thread(self._sessions.get, caller.tenant, session_id)
        with self._gateway.members.alone(session_id):
            made = await self.copy(caller, session_id, to)
            try:
                await asyncio.to_thread(self._sessions.delete, caller.tenant, session_id, session.head)
            except NotFound:  # deleted meanwhile, and the copy is all there is
                pass
            except Conflict:
                raise Conflict(
                    f"the session has changed while it was copied: it stays here, and {made['id']} is what it was before",
                    param="session_id",
                ) from None
        self._gateway.pinned.let_go(session_id)
        return made

    async def _target(self, key: str) -> Tenant:
        tenant = await asyncio.to_thread(self._gateway.state.keyring.find, key.encode())
        if tenant is None:
            raise NotFound("the target key is not valid", param="target_key")
        return tenant

    async def _send(self, caller: Caller, session_id: str, wanted: str, key: str | None) -> Json:
        peer = peers.chosen(self._gateway.settings.peers, wanted)
        async with self._sending, self.export(caller, session_id, blocks=True) as file:
            made, n_tokens = await asyncio.to_thread(peers.send, peer, key, file)
        return {"id": made, "object": "session.sent", "peer": peer.name, "restored_tokens": n_tokens}

    async def take_in(self, caller: Caller, read: Callable[[], Awaitable[bytes]], *, adopt: bool) -> tuple[Session, int]:
        """A session out of a file that is read first, and how many tokens of KV came with it.

        `adopt`: its transcript alone is welcome when it is another model's. Raises RequestError, Conflict, RateLimited.
        """
        async with self._one_more(caller):
            return await self._take_in(caller, await read(), adopt=adopt)

    async def _take_in(self, caller: Caller, data: bytes, *, adopt: bool) -> tuple[Session, int]:
        file = await asyncio.to_thread(portable.load, data)
        try:
            body = NewSession.model_validate({"messages": file.messages, "metadata": file.metadata, **file.context})
        except ValidationError as error:
            raise RequestError(f"the exported session cannot be read: {explain(error)[0]}") from None
        try:
            n_restored = await self._restore(caller, file, body)
        except Conflict as error:
            if not adopt:
                raise Conflict(f"{error}; adopt=true takes its transcript alone") from None
            n_restored = 0
        session = await asyncio.to_thread(
            lambda: self._sessions.create(caller.tenant, body.messages, context=body.context, metadata=body.metadata)
        )
        return session, n_restored

    async def _restore(self, caller: Caller, file: portable.Portable, body: NewSession) -> int:
        """File the KV that came with a session; returns of how many tokens. Raises Conflict for what means nothing here."""
        if file.model != model_id(self._service.model):
            raise Conflict("the session is of another model or another quantisation")
        if not file.blocks:
            return 0
        tokens: tuple[int, ...] | None = None
        with contextlib.suppress(RequestError):  # this chat template refuses what another one has shown
            tokens = await self._gateway.jobs.tokens(body.messages, body.context)
        if tokens is None or tuple(file.tokens) != tokens:
            raise Conflict(
                "the session's tokens are not those of its transcript here: it was edited, or another chat template's"
            )
        self._service.allow(caller.namespace, caller.allowance)
        n_restored = await self._service.restore(caller.namespace, tokens, file.blocks)
        if self._gateway.settings.turn_ahead:  # to where a conversation is that goes on here
            self._service.anticipate(caller.namespace, tokens)
        return n_restored

    async def _messages_within(self, caller: Caller, session_id: str, tokens: int) -> int:
        """The most messages from the beginning that are at most so many tokens."""
        session, said = await asyncio.to_thread(self._sessions.open, caller.tenant, session_id)
        low, high = 0, len(said)
        while low < high:
            middle = (low + high + 1) // 2
            if len(await self.tokens(session, said[:middle])) <= tokens:
                low = middle
            else:
                high = middle - 1
        return low

    @property
    def _service(self) -> Service:
        return self._gateway.service


def model_id(model: ModelInfo) -> str:
    """Equal where tokens and KV mean the same: same architecture, same size, same quantisation."""
    facts = (model.architecture, model.n_params, model.n_bytes, model.n_vocab, model.n_layers, model.cell_bytes)
    return sha256(repr(facts).encode()).hexdigest()[:32]
