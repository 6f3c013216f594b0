"""The far end of a link: a replica's service over TCP, for the ingresses and for its peers.

    generate        a task a stream; what all streams of a connection got in one turn of the loop leaves as one frame
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
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Protocol

from pasture.cluster.conversations import Conversations
from pasture.cluster.frames import Message, Wire, accept
from pasture.cluster.journal import Journal
from pasture.cluster.link import Source, event_to_plain
from pasture.cluster.members import Identity, Member
from pasture.cluster.peers import Peers
from pasture.cluster.plain import Plain, from_plain, to_plain
from pasture.cluster.values import Load
from pasture.core.errors import EngineError, PastureError
from pasture.core.ports import Service
from pasture.core.storage import BLOCK_TOKENS, BlockKey, Pin
from pasture.core.values import FinishReason, Namespace, Request, TokenEvent
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
        self.watchers: set[Wire] = set()
        self.uncached: dict[object, int] = {}
        """of what runs, the prompt tokens that are probably still to compute"""
        self._homes: list[Plain] = []
        """sessions that the ingresses have to hear of"""
        self._key = key
        self._trails = Trails(fingerprint)
        self._server: asyncio.Server | None = None
        self._reporting: asyncio.Task[None] | None = None
        self._handed: asyncio.Task[Message] | None = None

    async def start(self, host: str, port: int = 0) -> int:
        """Listen; returns the port."""
        self._server = await asyncio.start_server(self._serve, host, port)
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
            self._homes.append([session, key])

    async def hand_over(self, members: list[Member]) -> Message:
        """Once, however often it is asked for."""
        if self._handed is None:
            self._handed = asyncio.create_task(self._hand_over(members))
        return await asyncio.shield(self._handed)

    async def _hand_over(self, members: list[Member]) -> Message:
        await self.service.drain()
        return await self.peers.carry(self.conversations.latest_first(), members)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire = await accept(reader, writer, self._key)
        if wire is None:
            return
        wire.send(
            {
                "op": "hello",
                "replica": self.journal.replica,
                "epoch": self.journal.epoch,
                "identity": to_plain(self.identity),
            }
        )
        await _Caller(self, wire).run()

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
        message: Message = {
            "op": "delta",
            "number": delta.number,
            "n_stored": len(delta.stored),
            "uncached_tokens": self.load.uncached_tokens,
        }
        payload = b"".join((*delta.stored, *delta.removed))
        homes, self._homes = self._homes, []
        for wire in self.watchers:
            if wire.unsent_bytes <= MAX_UNSENT_BYTES:
                wire.send(message, payload)
                if homes:
                    wire.send({"op": "homes", "homes": homes})
        if with_statistics and self.watchers:
            self.tell_statistics(*self.watchers)

    def tell_statistics(self, *wires: Wire) -> None:
        found = self.service.statistics()
        found = replace(found, pool=replace(found.pool, prefixes=()))  # what people wrote stays on its machine
        for wire in wires:
            wire.send({"op": "statistics", "statistics": to_plain(found)})

    def tell_snapshot(self, wire: Wire) -> None:
        snapshot = self.journal.snapshot(self.load)
        message: Message = {"op": "snapshot", "number": snapshot.number, "uncached_tokens": self.load.uncached_tokens}
        wire.send(message, b"".join(snapshot.blocks))


class _Stream:
    """One request of a caller."""

    def __init__(self) -> None:
        self.unread = 0
        self.read = asyncio.Event()


class _Caller:
    """One connection."""

    def __init__(self, replica: ReplicaServer, wire: Wire) -> None:
        self._replica = replica
        self._wire = wire
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._streams: dict[int, _Stream] = {}
        self._pins: dict[int, Pin] = {}
        self._outbox: list[Plain] = []
        self._calls: dict[str, Callable[[Message, bytes], Coroutine[None, None, tuple[Plain, bytes]]]] = {
            "locate": self._locate,
            "export": self._export,
            "restore": self._restore,
            "pin": self._pin,
            "prefetch": self._prefetch,
            "verify": self._verify,
            "hand_over": self._hand_over,
        }

    async def run(self) -> None:
        """Until the other end is gone; whatever it had under way ends then."""
        try:
            while True:
                message, payload = await self._wire.receive()
                self._take(message, payload)
        except ConnectionError:
            pass
        except (KeyError, ValueError, TypeError) as error:
            log.warning("a frame that nobody understands; the connection is closed: %s", error)
        finally:
            self._replica.watchers.discard(self._wire)
            for task in self._tasks.values():
                task.cancel()
            for pin in self._pins.values():
                pin.release()
            self._wire.close()

    def _take(self, message: Message, payload: bytes) -> None:
        op, number = str(message["op"]), from_plain(int, message.get("id", 0))
        if op == "generate":
            request = replace(from_plain(Request, message["request"]), prompt=tuple(_tokens(payload)))
            source = None if message["source"] is None else from_plain(Source, message["source"])
            session = None if message["session"] is None else from_plain(str, message["session"])
            uncached_tokens = from_plain(int, message["uncached_tokens"])
            self._start(number, self._generate(number, request, session, uncached_tokens, source))
        elif op == "cancel":
            if number in self._tasks:
                self._tasks[number].cancel()
        elif op == "ack":
            if stream := self._streams.get(number):
                stream.unread -= from_plain(int, message["n"])
                stream.read.set()
        elif op == "watch":
            self._replica.watchers.add(self._wire)
            self._replica.tell_statistics(self._wire)
            self._replica.tell_snapshot(self._wire)
        elif op == "snapshot":
            self._replica.tell_snapshot(self._wire)
        elif op == "anticipate":
            typing = message.get("typing") is True
            self._replica.service.anticipate(_namespace(message), _tokens(payload), typing=typing)
        elif op == "unpin":
            if pin := self._pins.pop(from_plain(int, message["pin"]), None):
                pin.release()
        else:
            self._start(number, self._answer(number, self._calls[op](message, payload)))

    def _start(self, number: int, work: Coroutine[None, None, None]) -> None:
        task = self._tasks[number] = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._tasks.pop(number, None))

    # Streams

    async def _generate(
        self, number: int, request: Request, session: str | None, uncached_tokens: int, source: Source | None
    ) -> None:
        replica, stream = self._replica, _Stream()
        self._streams[number] = stream
        replica.uncached[stream] = uncached_tokens
        reply: list[int] = []
        try:
            if source is not None and (pulled := await replica.peers.pull(request, source)):
                self._wire.send({"op": "pulled", "n_bytes": pulled.n_bytes, "seconds": pulled.seconds})
            async with aclosing(replica.service.generate(request)) as events:
                async for event in events:
                    replica.uncached[stream] = 0
                    if event.token is not None:
                        reply.append(event.token)
                    if event.finish is not None and event.finish.reason in (FinishReason.STOP, FinishReason.LENGTH):
                        replica.at_home(request.namespace, array("i", [*request.prompt, *reply]), session)
                    self._put(number, event)
                    stream.unread += 1
                    while stream.unread >= WINDOW_EVENTS:
                        stream.read.clear()
                        await stream.read.wait()
        except Exception as error:
            self._fail(number, error)
        finally:
            del self._streams[number], replica.uncached[stream]

    def _put(self, number: int, event: TokenEvent) -> None:
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(event_to_plain(number, event))

    def _flush(self) -> None:
        if self._outbox:
            events, self._outbox = self._outbox, []
            self._wire.send({"op": "events", "events": events})

    def _fail(self, number: int, error: Exception) -> None:
        if not isinstance(error, PastureError):
            log.error("a request failed", exc_info=error)
            error = EngineError("the replica failed on this request")
        self._flush()
        self._wire.send({"op": "error", "id": number, "error": to_plain(error)})

    # Calls

    async def _answer(self, number: int, call: Coroutine[None, None, tuple[Plain, bytes]]) -> None:
        try:
            value, payload = await call
        except Exception as error:
            self._fail(number, error)
            return
        self._wire.send({"op": "result", "id": number, "value": value}, payload)
        await self._wire.drained()

    async def _locate(self, message: Message, payload: bytes) -> tuple[Plain, bytes]:
        deep = message.get("deep") is True
        return to_plain(await self._replica.service.locate(_namespace(message), _tokens(payload), deep=deep)), b""

    async def _export(self, message: Message, payload: bytes) -> tuple[Plain, bytes]:
        return None, await self._replica.service.export(_namespace(message), _tokens(payload))

    async def _restore(self, message: Message, payload: bytes) -> tuple[Plain, bytes]:
        n_bytes = from_plain(int, message["n"])
        namespace, tokens = _namespace(message), _tokens(payload[:n_bytes])
        exported, session = payload[n_bytes:], message.get("session")
        restored = await self._replica.service.restore(namespace, tokens, exported) if exported else 0
        if restored or session is not None:
            self._replica.at_home(namespace, tokens, None if session is None else from_plain(str, session))
        return restored, b""

    async def _pin(self, message: Message, payload: bytes) -> tuple[Plain, bytes]:
        number = from_plain(int, message["id"])
        self._pins[number] = await self._replica.service.pin(_namespace(message), _tokens(payload))
        return number, b""

    async def _prefetch(self, message: Message, payload: bytes) -> tuple[Plain, bytes]:
        await self._replica.service.prefetch(_namespace(message), _tokens(payload))
        return None, b""

    async def _verify(self, message: Message, payload: bytes) -> tuple[Plain, bytes]:
        await self._replica.service.verify()
        return None, b""

    async def _hand_over(self, message: Message, payload: bytes) -> tuple[Plain, bytes]:
        return await self._replica.hand_over(list(from_plain(tuple[Member, ...], message["members"]))), b""


def _tokens(payload: bytes) -> array[int]:
    tokens = array("i")
    tokens.frombytes(payload)
    return tokens


def _namespace(message: Message) -> Namespace:
    return Namespace(from_plain(str, message["namespace"]))
