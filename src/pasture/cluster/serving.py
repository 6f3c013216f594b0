"""The far end of a link: a replica's service over TCP, for the ingresses and for its peers.

    generate        a task a stream; what all streams of a connection got in one turn of the loop leaves as one frame, and a
                    stream's first event and its last at once
    watch           from then on the connection hears of blocks and load (ten times a second) and of statistics (twice)
    hand_over       nothing new is taken, what runs may finish, every conversation is carried to those who stay

A stream whose reader is `WINDOW_EVENTS` behind waits, and its request with it. Whoever asks has proven that he has the
cluster's key and is believed: namespaces come from the ingresses, which check API keys. Event loop only; owns no KV.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from array import array
from collections.abc import Coroutine, Sequence
from contextlib import aclosing
from dataclasses import asdict, replace
from functools import partial
from typing import Protocol

from pasture.cluster import messages
from pasture.cluster.conversations import Conversations
from pasture.cluster.frames import Wire, serve
from pasture.cluster.journal import Journal
from pasture.cluster.members import Identity, Member
from pasture.cluster.peers import Peers
from pasture.cluster.values import Load
from pasture.core.errors import EngineError, PastureError, ShuttingDown
from pasture.core.ports import Service
from pasture.core.storage import BLOCK_TOKENS, BlockKey, Pin
from pasture.core.values import FinishReason, Namespace, TokenEvent, Usage
from pasture.tiers.trail import Trails

log = logging.getLogger(__name__)

NEWS_SECONDS = 0.1
STATISTICS_TICKS = 5
LIVE_TICKS = 5
"""news between two looks at the live cache"""
WINDOW_EVENTS = 1024
MAX_UNSENT_BYTES = 32 << 20
"""in a connection's buffer before it is spared news; it will notice the gap"""


class ReplicaService(Service, Protocol):
    """A service on this machine, as its replica needs it."""

    async def live(self) -> Sequence[tuple[Namespace, array[int]]]:
        """What every sequence in the live cache holds."""
        ...


class ReplicaServer:
    """One start of one replica."""

    def __init__(self, service: ReplicaService, identity: Identity, journal: Journal, key: bytes) -> None:
        """The service stays the caller's to close."""
        self.service = service
        self.identity = identity
        self.journal = journal
        fingerprint = bytes.fromhex(identity.fingerprint)
        self.conversations = Conversations(fingerprint)
        self.peers = Peers(service, key)
        self.watchers: set[Wire[messages.ToReplica]] = set()
        self.uncached: dict[object, int] = {}
        """of what runs, the prompt tokens that are probably still to compute"""
        self._homes: list[tuple[str, str | None]] = []
        """sessions that the ingresses have to hear of"""
        self._key = key
        self._trails = Trails(fingerprint)
        self._server: asyncio.Server | None = None
        self._reporting: asyncio.Task[None] | None = None
        self._handed: asyncio.Task[dict[str, int]] | None = None

    async def start(self, host: str, port: int = 0) -> int:
        """Listen; returns the port."""
        self._server = await serve(host, port, self._key, self._welcome)
        self._reporting = asyncio.create_task(self._report())
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def stop(self) -> None:
        """Close every connection."""
        if self._reporting is not None:
            self._reporting.cancel()
        if self._server is not None:
            self._server.close()
        for wire in list(self.watchers):
            wire.close()
        self.peers.close()

    @property
    def load(self) -> Load:
        return Load(sum(self.uncached.values()))

    def at_home(self, namespace: Namespace, tokens: array[int], session: str | None) -> None:
        """A conversation stands at these tokens here; whoever routes should know."""
        self.conversations.note(namespace, tokens, session)
        if session is not None:
            n_full = len(tokens) // BLOCK_TOKENS
            key = self._trails.of(namespace, tokens)[n_full - 1].key.hex() if n_full else None
            self._homes.append((session, key))

    async def hand_over(self, members: Sequence[Member]) -> dict[str, int]:
        """Once, however often it is asked for."""
        if self._handed is None:
            self._handed = asyncio.create_task(self._hand_over(members))
        return await asyncio.shield(self._handed)

    async def _hand_over(self, members: Sequence[Member]) -> dict[str, int]:
        await self.service.drain()
        return await self.peers.carry(self.conversations.latest_first(), members)

    def _welcome(self, wire: Wire[messages.ToReplica]) -> None:
        wire.send(messages.Hello(self.journal.replica, self.journal.epoch, self.identity))
        _Caller(self, wire)

    # News

    async def _report(self) -> None:
        for tick in itertools.count():
            try:
                if tick % LIVE_TICKS == 0:
                    await self._look()
                self._tell(with_statistics=tick % STATISTICS_TICKS == 0)
            except PastureError:
                return  # the service has ended
            await asyncio.sleep(NEWS_SECONDS)

    async def _look(self) -> None:
        keys: set[BlockKey] = set()
        for namespace, tokens in await self.service.live():
            trail = self._trails.of(namespace, tokens)
            keys.update(trail[index].key for index in range(len(tokens) // BLOCK_TOKENS))
        self.journal.live(keys)

    def _tell(self, *, with_statistics: bool) -> None:
        delta = self.journal.next_delta(self.load)
        frame = messages.Delta(delta.number, len(delta.stored), self.load.uncached_tokens)
        payload = b"".join((*delta.stored, *delta.removed))
        homes, self._homes = self._homes, []
        for wire in self.watchers:
            if wire.unsent_bytes <= MAX_UNSENT_BYTES:
                wire.send(frame, payload)
                if homes:
                    wire.send(messages.Homes(homes))
        if with_statistics and self.watchers:
            self.tell_statistics(*self.watchers)

    def tell_statistics(self, *wires: Wire[messages.ToReplica]) -> None:
        found = self.service.statistics()
        prefixes = tuple(replace(prefix, tokens=()) for prefix in found.pool.prefixes)  # what people wrote stays here
        found = replace(found, pool=replace(found.pool, prefixes=prefixes))
        for wire in wires:
            wire.send(messages.Statistics(found))

    def tell_snapshot(self, wire: Wire[messages.ToReplica]) -> None:
        snapshot = self.journal.snapshot(self.load)
        wire.send(messages.Snapshot(snapshot.number, self.load.uncached_tokens), b"".join(snapshot.blocks))


class _Stream:
    """One request of a caller."""

    def __init__(self) -> None:
        self.unread = 0
        self.read = asyncio.Event()


class _Caller:
    """One connection, until the other end is gone; whatever it had under way ends then."""

    def __init__(self, replica: ReplicaServer, wire: Wire[messages.ToReplica]) -> None:
        self._replica = replica
        self._wire = wire
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._streams: dict[int, _Stream] = {}
        self._pins: dict[int, Pin] = {}
        self._outbox: list[messages.Event] = []
        wire.listen(self._take, self._end)

    def _end(self) -> None:
        self._replica.watchers.discard(self._wire)
        for task in self._tasks.values():
            task.cancel()
        for pin in self._pins.values():
            pin.release()

    def _take(self, frame: messages.ToReplica, payload: bytes) -> None:
        match frame:
            case messages.Generate():
                self._start(frame.id, self._generate(frame))
            case messages.Cancel(number):
                if number in self._tasks:
                    self._tasks[number].cancel()
            case messages.Acknowledge(number, n_events):
                if stream := self._streams.get(number):
                    stream.unread -= n_events
                    stream.read.set()
            case messages.Watch():
                self._replica.watchers.add(self._wire)
                self._replica.tell_statistics(self._wire)
                self._replica.tell_snapshot(self._wire)
            case messages.AskSnapshot():
                self._replica.tell_snapshot(self._wire)
            case messages.Allow(namespace, allowance):
                self._replica.service.allow(namespace, allowance)
            case messages.KeepFor(seconds):
                self._replica.service.keep_for(seconds)
            case messages.Anticipate(namespace, tokens, typing):
                self._replica.service.anticipate(namespace, messages.unpack_tokens(tokens), typing=typing)
            case messages.Unpin(number):
                if pin := self._pins.pop(number, None):
                    pin.release()
            case _:
                self._start(frame.id, self._answer(frame, payload))

    def _start(self, number: int, work: Coroutine[None, None, None]) -> None:
        task = self._tasks[number] = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._tasks.pop(number, None))

    # Streams

    async def _generate(self, asked: messages.Generate) -> None:
        replica, stream, request = self._replica, _Stream(), asked.request
        self._streams[asked.id] = stream
        replica.uncached[stream] = asked.uncached_tokens
        reply: list[int] = []
        begun = False
        try:
            if asked.source is not None and (pulled := await replica.peers.pull(request, asked.source)):
                self._wire.send(messages.Pulled(pulled.n_bytes, pulled.seconds))
            on_end = partial(self._ended, asked.id) if request.traced else None
            begun = True
            async with aclosing(replica.service.generate(request, on_end)) as events:
                async for event in events:
                    replica.uncached[stream] = 0
                    self._put(asked.id, event)
                    if event.finish is not None or not reply:
                        self._flush()  # somebody waits for it
                    if event.token is not None:
                        reply.append(event.token)
                    if event.finish is not None and event.finish.reason in (FinishReason.STOP, FinishReason.LENGTH):
                        replica.at_home(request.namespace, array("i", [*request.prompt, *reply]), asked.session)
                    stream.unread += 1
                    while stream.unread >= WINDOW_EVENTS:
                        stream.read.clear()
                        await stream.read.wait()
        except Exception as error:
            self._fail(asked.id, error)
        except asyncio.CancelledError:
            if not begun:  # else the service says how it has ended
                self._fail(asked.id, ShuttingDown("left before it began"))
            raise
        finally:
            del self._streams[asked.id], replica.uncached[stream]

    def _put(self, number: int, event: TokenEvent) -> None:
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(messages.Event.of(number, event))

    def _flush(self) -> None:
        if self._outbox:
            events, self._outbox = self._outbox, []
            self._wire.send(messages.Events(events))

    def _ended(self, number: int, usage: Usage) -> None:
        self._wire.send(messages.Ended(number, usage))

    def _fail(self, number: int, error: Exception) -> None:
        if not isinstance(error, PastureError):
            log.error("a request failed", exc_info=error)
            error = EngineError("the replica failed on this request")
        self._flush()
        self._wire.send(messages.Failed(number, error))

    # Calls

    async def _answer(self, call: messages.Call, payload: bytes) -> None:
        try:
            answer, behind = await self._called(call, payload)
        except Exception as error:
            self._fail(call.id, error)
            return
        self._wire.send(answer, behind)
        await self._wire.drained()

    async def _called(self, call: messages.Call, payload: bytes) -> tuple[messages.Answer, bytes]:
        service = self._replica.service
        match call:
            case messages.Locate(number, namespace, tokens, deep):
                return messages.Located(number, await service.locate(namespace, messages.unpack_tokens(tokens), deep=deep)), b""
            case messages.Export(number, namespace, tokens):
                return messages.Done(number), await service.export(namespace, messages.unpack_tokens(tokens))
            case messages.Restore():
                return messages.Counted(call.id, {"tokens": await self._restore(call, payload)}), b""
            case messages.Pin(number, namespace, tokens):
                self._pins[number] = await service.pin(namespace, messages.unpack_tokens(tokens))
            case messages.Prefetch(_, namespace, tokens):
                await service.prefetch(namespace, messages.unpack_tokens(tokens))
            case messages.OpenPrefix(number, prefix, n_tokens):
                return messages.Opened(number, await service.open_prefix(prefix, n_tokens)), b""
            case messages.Verify(number):
                return messages.Counted(number, asdict(await service.verify())), b""
            case messages.HandOver(number, members):
                return messages.Counted(number, await self._replica.hand_over(members)), b""
        return messages.Done(call.id), b""

    async def _restore(self, call: messages.Restore, exported: bytes) -> int:
        tokens = messages.unpack_tokens(call.tokens)
        restored = await self._replica.service.restore(call.namespace, tokens, exported) if exported else 0
        if restored or call.session is not None:
            self._replica.at_home(call.namespace, tokens, call.session)
        return restored
