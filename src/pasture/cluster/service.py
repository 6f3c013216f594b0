"""`core.ports.Service` over the replicas of a cluster: what an ingress serves its API from.

    generate    the router places it; the replica's events pass through; when the replica dies, another one goes on
    the rest    asked of the replica that has most of the tokens, or of all

A client of a stream whose replica dies sees a pause. A request ends with an error only when no replica takes it for
`patience_seconds`, when several replicas in a row are lost before any of them writes a token (it may be what kills them), or
when it is the request's own fault. One event loop: everything but `statistics`, `keep_for`, `close` and the
release of pins belongs to it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field

from pasture.cluster.continuing import Continuing
from pasture.cluster.forest import marks, origin
from pasture.cluster.link import Link, OnLeft, ReplicaLost
from pasture.cluster.links import Links
from pasture.cluster.members import Directory, vocabulary_mark
from pasture.cluster.messages import Source
from pasture.cluster.pulling import PullCosts
from pasture.cluster.router import Router, RouterSettings, never_pull
from pasture.cluster.sums import as_loaded, total
from pasture.cluster.survival import Story
from pasture.cluster.values import Decision, Placement, Reason, ReplicaId, SessionKey
from pasture.core.errors import Conflict, EngineError, NoReplica, NotFound, QueueFull, ShuttingDown
from pasture.core.ports import Clock, OnEnd, Vocabulary
from pasture.core.statistics import PrefixContent, ServiceStatistics, Verification
from pasture.core.storage import BLOCK_TOKENS, BlockKey, Pin
from pasture.core.values import (
    Allowance,
    FinishReason,
    ModelInfo,
    Namespace,
    Request,
    RequestId,
    TokenEvent,
    Usage,
    Whereabouts,
)
from pasture.tiers.keys import chain, root_key

log = logging.getLogger(__name__)

MAX_LOSSES = 4
"""replicas in a row that a request may lose before it has got a token from any of them"""


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    patience_seconds: float = 15.0
    """without any replica that takes a request, before it is refused"""
    drain_seconds: float = 60.0
    pulls: bool = True
    """whether replicas fetch from each other; not where they share a pool, which has it all"""
    router: RouterSettings = field(default_factory=RouterSettings)


@dataclass(frozen=True, slots=True)
class _Leg:
    link: Link
    placement: Placement
    decision: Decision
    source: Source | None


class RemotePin:
    """Keeps blocks in the RAM of one replica; gone with it. See `core.storage.Pin`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, link: Link, number: int) -> None:
        self._loop = loop
        self._link = link
        self._number: int | None = number

    def release(self) -> None:
        number, self._number = self._number, None
        if number is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._link.unpin, number)


class ClusterService:
    """See the module. `start` it on its loop."""

    def __init__(
        self,
        model: ModelInfo,
        vocabulary: Vocabulary,
        directory: Directory,
        key: bytes,
        settings: ClusterSettings | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """`key`: the cluster's, which every replica has."""
        self._model = model
        self._vocabulary = vocabulary
        self._settings = settings or ClusterSettings()
        self._clock = clock
        costs = PullCosts(model.cell_bytes if model.shareable else 0)
        self.router = Router(self._settings.router, costs.seconds if self._settings.pulls else never_pull)
        self.links = Links(directory, key, self.router, costs, vocabulary_mark(vocabulary), self._at_home)
        self._continuing = Continuing()
        self._longest = 0
        self._n_running = 0
        self._idle = asyncio.Event()
        self._draining = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self.survived = 0
        """times that a request went on after its replica was lost"""

    def start(self) -> None:
        """Begin to follow the directory, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self.links.start()

    @property
    def model(self) -> ModelInfo:
        return as_loaded(self._model, [link.identity.model for link in tuple(self.links.open.values())])

    @property
    def vocabulary(self) -> Vocabulary:
        return self._vocabulary

    @property
    def max_conversation_tokens(self) -> int:
        """What every replica can hold; as last known where there is none."""
        found = [link.identity.max_conversation_tokens for link in self.links.open.values()]
        self._longest = min(found, default=self._longest)
        return self._longest or self._model.n_ctx_train

    @property
    def ready(self) -> bool:
        return bool(self.router.replicas()) and not self._draining

    @property
    def alive(self) -> bool:
        return True  # replicas end and come again without the ingress

    # Requests

    async def generate(self, request: Request, on_end: OnEnd | None = None) -> AsyncGenerator[TokenEvent, None]:
        """See `core.ports.Service.generate`; raises NoReplica too."""
        if self._draining:
            raise ShuttingDown("the server is shutting down; send the request to another one")
        self._n_running += 1
        self._idle.clear()
        try:
            async with aclosing(self._tell(Story(request, self._clock()), on_end)) as events:
                async for event in events:
                    yield event
        finally:
            self._n_running -= 1
            if not self._n_running:
                self._idle.set()

    async def _tell(self, story: Story, on_end: OnEnd | None) -> AsyncGenerator[TokenEvent, None]:
        ended_at: float | None = None

        def left(usage: Usage | None = None) -> None:
            assert on_end is not None
            on_end(story.left(usage, self._clock() if ended_at is None else ended_at))

        hears = None if on_end is None else left
        avoid: frozenset[ReplicaId] = frozenset()
        losses, fingerprint = 0, ""
        try:
            while (rest := story.next_leg(self._clock())) is not None:
                if story.sent:
                    avoid |= self.links.others_than(fingerprint)
                try:
                    leg = await self._place(rest, avoid)
                except (NoReplica, asyncio.CancelledError):
                    if hears is not None:
                        hears()
                    raise
                n_sent, fingerprint = len(story.sent), leg.link.identity.fingerprint
                try:
                    async with aclosing(self._leg(rest, leg, hears)) as events:
                        async for event in events:
                            told = story.told(event, self._clock())
                            if told.finish is not None:
                                self._finished(story, leg)  # before the end is told: nobody comes back after it
                                yield told
                                return
                            yield told
                except (ReplicaLost, ShuttingDown, EngineError, QueueFull) as lost:
                    avoid |= {leg.decision.replica}
                    if len(story.sent) > n_sent:
                        losses, avoid = 0, frozenset({leg.decision.replica})
                    losses += 1
                    if losses >= MAX_LOSSES or (isinstance(lost, QueueFull) and avoid >= set(self.router.replicas())):
                        if hears is not None:
                            hears()
                        raise lost if isinstance(lost, QueueFull) else _given_up(lost) from lost
                    self.survived += 1
                    log.warning("%s goes on elsewhere after %d tokens: %r", rest.request_id, len(story.sent), lost)
            yield story.ended(self._clock())
        finally:
            ended_at = self._clock()

    async def _leg(self, request: Request, leg: _Leg, left: OnLeft | None) -> AsyncGenerator[TokenEvent, None]:
        """The events of one replica; an end that is none of the request's is the loss of the replica."""
        self.router.started(request.request_id, leg.placement, leg.decision)
        try:
            uncached = leg.decision.uncached_tokens
            async with aclosing(leg.link.generate(request, leg.placement.session, uncached, leg.source, left)) as events:
                async for event in events:
                    finish = event.finish
                    if finish is not None and finish.reason is FinishReason.CANCELLED:
                        raise ReplicaLost(f"{leg.decision.replica} has closed")
                    if finish is not None and isinstance(finish.error, EngineError):
                        raise finish.error
                    self.router.progress(request.request_id, 0)
                    yield event
        finally:
            self.router.finished(request.request_id)

    async def _place(self, request: Request, avoid: frozenset[ReplicaId]) -> _Leg:
        """Raises NoReplica when nobody can take it for too long."""
        patience = self._clock() + self._settings.patience_seconds
        while True:
            placement = self._placement(request, avoid)
            decision = self.router.place(placement)
            if decision is not None and (link := self.links.open.get(decision.replica)) is not None:
                return _Leg(link, placement, decision, self._source(decision))
            left = patience - self._clock()
            if left <= 0:
                raise NoReplica("no replica can take the request at present; try again")
            await self.links.changed(min(left, 0.5))
            avoid = frozenset() if not request.drawn_tokens else avoid - set(self.router.replicas())

    def _placement(self, request: Request, avoid: frozenset[ReplicaId]) -> Placement:
        path = self._path(request.namespace, request.prompt)
        if request.session is not None:
            session = SessionKey(f"{request.namespace}\0{request.session}")
        else:
            session = self._continuing.session(path, request.request_id)
        return Placement(path, len(request.prompt), session, avoid)

    def _source(self, decision: Decision) -> Source | None:
        owner = None if decision.pull is None else self.links.open.get(decision.pull.owner)
        if decision.pull is None or owner is None:
            return None
        return Source(owner.member, (decision.pull.last + 1) * BLOCK_TOKENS)  # a block that is not full ends a conversation

    def _path(self, namespace: Namespace, tokens: Sequence[int]) -> tuple[BlockKey, ...]:
        whole = array("i", tokens[: len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS])
        return tuple(address.key for address in chain(root_key(self.links.fingerprint, namespace), whole))

    def _finished(self, story: Story, leg: _Leg) -> None:
        if leg.placement.session is not None:
            path = self._path(story.request.namespace, (*story.request.prompt, *story.sent))
            self._continuing.note(path, leg.placement.session)

    # What is asked about tokens

    async def locate(self, namespace: Namespace, tokens: Sequence[int], *, deep: bool = False) -> Whereabouts:
        """Of the replica that has most."""
        return (await self._best(namespace, array("i", tokens), deep=deep))[1]

    async def open_prefix(self, number: int, n_tokens: int) -> PrefixContent | None:
        """Of the replica that it lives on; None where that has gone."""
        own, mark = origin(number)
        replica = next((replica for replica, its in self._marks().items() if its == mark), None)
        if replica is None:
            return None
        try:
            return await self.links.open[replica].open_prefix(own, n_tokens)
        except (ReplicaLost, ShuttingDown):
            return None

    async def pin(self, namespace: Namespace, tokens: Sequence[int]) -> Pin:
        """On the replica that has most; gone with it."""
        path = array("i", tokens)
        link, _ = await self._best(namespace, path)
        try:
            return RemotePin(asyncio.get_running_loop(), link, await link.pin(namespace, path))
        except ReplicaLost as lost:
            raise NoReplica(f"{lost} was lost") from lost

    def allow(self, namespace: Namespace, allowance: Allowance) -> None:
        for link in self.links.open.values():
            link.allow(namespace, allowance)

    def keep_for(self, seconds: Mapping[Namespace, float]) -> None:
        """Of all replicas, those that come later as well."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended, and this service with it
                self._loop.call_soon_threadsafe(self.links.keep_for, seconds)

    async def quiet(self) -> None:
        """Returns at once: nothing is computed in this process."""

    def anticipate(self, namespace: Namespace, tokens: Sequence[int], *, typing: bool = False) -> None:
        link = self._likely(namespace, tokens)
        if link is not None:
            link.anticipate(namespace, array("i", tokens), typing=typing)

    async def prefetch(self, namespace: Namespace, tokens: Sequence[int]) -> None:
        """Where a request with these tokens would go now."""
        link = self._likely(namespace, tokens)
        if link is not None:
            with suppress(ReplicaLost):
                await link.prefetch(namespace, array("i", tokens))

    async def export(self, namespace: Namespace, tokens: Sequence[int]) -> bytes:
        path = array("i", tokens)
        link, _ = await self._best(namespace, path)
        try:
            return await link.export(namespace, path)
        except ReplicaLost:
            return b""

    async def restore(self, namespace: Namespace, tokens: Sequence[int], exported: bytes) -> int:
        link = self._likely(namespace, tokens)
        if link is None:
            raise NoReplica("no replica can take it at present; try again")
        try:
            return await link.restore(namespace, array("i", tokens), exported)
        except ReplicaLost as lost:
            raise NoReplica(f"{lost} was lost") from lost

    async def move(self, namespace: Namespace, tokens: Sequence[int], sessions: Sequence[str], replica: str) -> int:
        """See `core.ports.Movable.move`."""
        target = self.links.open.get(ReplicaId(replica))
        if target is None:
            raise NotFound(f"there is no replica {replica}", param="replica")
        if target.member.replica not in self.router.replicas():
            raise Conflict(f"{replica} is being drained", param="replica")
        path = array("i", tokens)
        source, _ = await self._best(namespace, path)
        n_tokens = 0
        try:
            exported = b"" if source is target else await source.export(namespace, path)
            for session in sessions:
                key = SessionKey(f"{namespace}\0{session}")
                n_tokens = max(n_tokens, await target.restore(namespace, path, exported, key))
                self._at_home(key, None, target.member.replica)
        except ReplicaLost as lost:
            raise NoReplica(f"{lost} was lost; nothing was moved") from lost
        found = await target.locate(namespace, path)
        return max(n_tokens, found.live_tokens, found.ram_tokens)

    async def verify(self) -> Verification:
        found = Verification()
        for link in list(self.links.open.values()):
            with suppress(ReplicaLost):
                found += await link.verify()
        return found

    def _at_home(self, session: SessionKey, key: BlockKey | None, replica: ReplicaId) -> None:
        """From now on the session, whose conversation stands at that block, is at home there."""
        if key is not None:
            self._continuing.note((key,), session)
        if replica in self.router.replicas():
            request = RequestId(f"move\0{session}")
            self.router.started(request, Placement((), 0, session), Decision(replica, Reason.SESSION, 0, 0))
            self.router.finished(request)

    def _likely(self, namespace: Namespace, tokens: Sequence[int]) -> Link | None:
        """Where a request with these tokens would go now."""
        path = self._path(namespace, tokens)
        session = self._continuing.session(path, RequestId("asked"))
        decision = self.router.place(Placement(path, len(tokens), session))
        return None if decision is None else self.links.open.get(decision.replica)

    async def _best(self, namespace: Namespace, tokens: array[int], *, deep: bool = False) -> tuple[Link, Whereabouts]:
        """Who has most of the tokens live or in RAM, of equals the one that has most behind it. Raises NoReplica."""
        links = list(self.links.open.values())
        answers = await asyncio.gather(*(link.locate(namespace, tokens, deep=deep) for link in links), return_exceptions=True)
        found = [(link, where) for link, where in zip(links, answers, strict=True) if isinstance(where, Whereabouts)]
        if not found:
            raise NoReplica("no replica is there at present; try again")
        return max(found, key=lambda pair: _riches(pair[1]))

    # The end

    def statistics(self) -> ServiceStatistics:
        """The sum over the replicas, as of their last reports."""
        marked, reported = self._marks(), dict(self.links.statistics)
        known = {replica: found for replica, found in reported.items() if replica in marked}  # the loop goes on meanwhile
        return total(self.model, known, marked, draining=self._draining)

    def _marks(self) -> dict[ReplicaId, int]:
        return marks(link.member for link in tuple(self.links.open.values()))

    async def drain(self) -> bool:
        """This ingress takes nothing new and lets what runs through it finish."""
        self._draining = True
        if self._n_running:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), self._settings.drain_seconds)
        return not self._n_running

    def close(self, *, at_once: bool = False) -> None:
        """On its loop, or from another thread while that runs. There is nothing here to keep, so it is always at once."""
        self._draining = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.links.close)


def _riches(found: Whereabouts) -> tuple[int, int]:
    return max(found.live_tokens, found.ram_tokens), max(found.slow_tokens.values(), default=0)


def _given_up(lost: Exception) -> Exception:
    if isinstance(lost, EngineError):
        return lost
    return NoReplica("one replica after another was lost on this request; it is not tried again")
