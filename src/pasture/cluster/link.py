"""The near end of a connection to a replica: many streams and calls over one wire, and the moment it is lost.

    ReplicaLost      raised by whatever was under way when the connection ended, or when the replica said nothing for too long
    on_news          hears everything that a replica tells unasked: its blocks, its load, its statistics

An ingress has one link a replica; a replica has links to its peers while it carries conversations to them. Event loop only.
"""

from __future__ import annotations

import asyncio
import itertools
from array import array
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from pasture.cluster.frames import Message, NotOfThisCluster, Wire, connect
from pasture.cluster.members import Identity, Member
from pasture.cluster.plain import Plain, from_plain, to_plain
from pasture.core.errors import PastureError
from pasture.core.values import Finish, Namespace, Request, TokenEvent, TokenLogprobs, Usage, Whereabouts

SILENCE_SECONDS = 5.0
"""without a word from a replica, which reports twice a second, before it counts as dead"""
ACKNOWLEDGE_EVENTS = 64
"""read so many before the replica is told"""

OnNews = Callable[[Message, bytes], None]


class ReplicaLost(Exception):
    """The replica cannot be reached any more; what was under way there is lost."""


@dataclass(frozen=True, slots=True)
class Source:
    """Who has the KV of a prompt's beginning, for a replica that should fetch it first."""

    member: Member
    n_tokens: int


class Link:
    """An open connection to one start of one replica."""

    def __init__(self, wire: Wire, member: Member, identity: Identity, on_news: OnNews | None) -> None:
        self.member = member
        self.identity = identity
        self._wire = wire
        self._on_news = on_news
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Queue[tuple[Message, bytes] | TokenEvent | None]] = {}
        self.closed = asyncio.Event()
        self._reading = asyncio.create_task(self._read())
        if on_news is not None:
            wire.send({"op": "watch"})

    def close(self) -> None:
        """Everything under way here is lost."""
        self._reading.cancel()
        self._end()

    async def generate(
        self, request: Request, session: str | None, uncached_tokens: int, source: Source | None = None
    ) -> AsyncGenerator[TokenEvent, None]:
        """As `Service.generate`; raises ReplicaLost too.

        `session`: what the router knows the conversation by; `uncached_tokens`: what it expects the replica to compute.
        """
        message: Message = {
            "op": "generate",
            "request": to_plain(replace(request, prompt=())),
            "session": session,
            "uncached_tokens": uncached_tokens,
            "source": to_plain(source),
        }
        number, answers = self._begin(message, array("i", request.prompt).tobytes())
        unacknowledged, ended = 0, False
        try:
            while not ended:
                answer = await answers.get()
                if isinstance(answer, tuple):
                    ended = True
                    raise _error(answer[0])
                if answer is None:
                    ended = True
                    raise ReplicaLost(self.member.replica)
                ended = answer.finish is not None
                unacknowledged += 1
                if unacknowledged == ACKNOWLEDGE_EVENTS:
                    self._wire.send({"op": "ack", "id": number, "n": unacknowledged})
                    unacknowledged = 0
                yield answer
        finally:
            del self._waiting[number]
            if not ended:
                self._wire.send({"op": "cancel", "id": number})

    async def locate(self, namespace: Namespace, tokens: array[int], *, deep: bool = False) -> Whereabouts:
        answer, _ = await self._call("locate", namespace, tokens, deep=deep)
        return from_plain(Whereabouts, answer["value"])

    async def export(self, namespace: Namespace, tokens: array[int]) -> bytes:
        _, payload = await self._call("export", namespace, tokens)
        return payload

    async def restore(self, namespace: Namespace, tokens: array[int], exported: bytes, session: str | None = None) -> int:
        """As `Service.restore`, of nothing too. `session`: is at home there from now on, and all ingresses are told."""
        answer, _ = await self._call("restore", namespace, tokens, exported, session=session)
        return from_plain(int, answer["value"])

    async def pin(self, namespace: Namespace, tokens: array[int]) -> int:
        """The number to give to `unpin`."""
        answer, _ = await self._call("pin", namespace, tokens)
        return from_plain(int, answer["value"])

    def unpin(self, pin: int) -> None:
        self._wire.send({"op": "unpin", "pin": pin})

    def anticipate(self, namespace: Namespace, tokens: array[int], *, typing: bool) -> None:
        self._wire.send({"op": "anticipate", "namespace": namespace, "typing": typing}, tokens.tobytes())

    async def prefetch(self, namespace: Namespace, tokens: array[int]) -> None:
        await self._call("prefetch", namespace, tokens)

    async def verify(self) -> None:
        await self._call("verify")

    async def hand_over(self, members: list[Member]) -> Message:
        """Have it take nothing new, finish what runs, and carry its conversations to these; returns what came of it."""
        answer, _ = await self._call("hand_over", members=to_plain(members))
        return from_plain(dict, answer["value"])

    def ask_snapshot(self) -> None:
        self._wire.send({"op": "snapshot"})

    # Inside

    async def _call(
        self,
        op: str,
        namespace: Namespace | None = None,
        tokens: array[int] | None = None,
        payload: bytes = b"",
        **more: Plain,
    ) -> tuple[Message, bytes]:
        data = b"" if tokens is None else tokens.tobytes()
        number, answers = self._begin({"op": op, "namespace": namespace, "n": len(data), **more}, data + payload)
        try:
            answer = await answers.get()
        finally:
            del self._waiting[number]
        if answer is None:
            raise ReplicaLost(self.member.replica)
        assert isinstance(answer, tuple)
        if answer[0]["op"] == "error":
            raise _error(answer[0])
        return answer

    def _begin(self, message: Message, payload: bytes) -> tuple[int, asyncio.Queue[tuple[Message, bytes] | TokenEvent | None]]:
        if self.closed.is_set():
            raise ReplicaLost(self.member.replica)
        number = next(self._numbers)
        answers = self._waiting[number] = asyncio.Queue()
        self._wire.send(message | {"id": number}, payload)
        return number, answers

    async def _read(self) -> None:
        try:
            while True:
                silence = SILENCE_SECONDS if self._on_news is not None else None
                async with asyncio.timeout(silence):
                    message, payload = await self._wire.receive()
                self._take(message, payload)
        except (ConnectionError, TimeoutError):
            pass
        finally:
            self._end()

    def _take(self, message: Message, payload: bytes) -> None:
        op = message["op"]
        if op == "events":
            events = message["events"]
            assert isinstance(events, list)
            for event in events:
                assert isinstance(event, list)
                number = event[0]
                assert isinstance(number, int)
                if number in self._waiting:
                    self._waiting[number].put_nowait(event_from_plain(event))
        elif op in ("result", "error"):
            number = message["id"]
            assert isinstance(number, int)
            if number in self._waiting:
                self._waiting[number].put_nowait((message, payload))
        elif self._on_news is not None:
            self._on_news(message, payload)

    def _end(self) -> None:
        if not self.closed.is_set():
            self.closed.set()
            self._wire.close()
            for answers in self._waiting.values():
                answers.put_nowait(None)


async def open_link(member: Member, key: bytes, on_news: OnNews | None = None) -> Link:
    """Raises ReplicaLost where it cannot be reached, is somebody else by now, or does not have the key."""
    try:
        wire = await connect(member.host, member.port, key)
    except (ConnectionError, NotOfThisCluster) as error:
        raise ReplicaLost(f"{member.replica}: {error}") from error
    try:
        hello, _ = await asyncio.wait_for(wire.receive(), SILENCE_SECONDS)
        if (hello.get("replica"), hello.get("epoch")) != (member.replica, member.epoch):
            raise ReplicaLost(f"{member.replica} has restarted")
        return Link(wire, member, from_plain(Identity, hello["identity"]), on_news)
    except (ConnectionError, TimeoutError, ValueError, KeyError) as error:
        wire.close()
        raise ReplicaLost(f"{member.replica}: {error}") from error
    except ReplicaLost:
        wire.close()
        raise


def event_to_plain(number: int, event: TokenEvent) -> list[Plain]:
    """Short, because there is one a token; what ends the list with nothing is left away."""
    plain: list[Plain] = [number, event.token, to_plain(event.logprobs), to_plain(event.finish), to_plain(event.usage)]
    while plain[-1] is None and len(plain) > 2:
        plain.pop()
    return plain


def event_from_plain(plain: list[Plain]) -> TokenEvent:
    _, token, logprobs, finish, usage = [*plain, None, None, None][:5]
    with suppress(ValueError):
        return TokenEvent(
            None if token is None else from_plain(int, token),
            None if logprobs is None else from_plain(TokenLogprobs, logprobs),
            None if finish is None else from_plain(Finish, finish),
            None if usage is None else from_plain(Usage, usage),
        )
    raise ConnectionError("an event that is none")


def _error(message: Message) -> PastureError:
    return from_plain(PastureError, message["error"])
