"""The near end of a connection to a replica: many streams and calls over one wire, and the moment it is lost.

    ReplicaLost      raised by whatever was under way when the connection ended, or when the replica said nothing for too long
    on_news          hears everything that a replica tells unasked: its blocks, its load, its statistics

An ingress has one link a replica; a replica has links to its peers while it carries conversations to them. Event loop only.
"""

from __future__ import annotations

import asyncio
import itertools
from array import array
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import TypeVar

from pasture.cluster import messages
from pasture.cluster.frames import NotOfThisCluster, Wire, connect
from pasture.cluster.members import Identity, Member
from pasture.core.statistics import PrefixContent, Verification
from pasture.core.values import Allowance, Namespace, Request, TokenEvent, Usage, Whereabouts

LAST_WORDS_SECONDS = 30.0
"""for a replica to say what a request had cost that its reader has left"""
SILENCE_SECONDS = 5.0
"""without a word from a replica, which reports twice a second, before it counts as dead"""
ACKNOWLEDGE_EVENTS = 64
"""read so many before the replica is told"""

OnNews = Callable[[messages.News, bytes], None]
OnLeft = Callable[[Usage | None], None]
"""hears what a leg of a reply has cost whose end nobody gets; None: the replica did not say"""
_Answer = TypeVar("_Answer", messages.Located, messages.Opened, messages.Counted, messages.Done)
_Waiting = asyncio.Queue[TokenEvent | tuple[messages.Answer, bytes] | None]
"""what comes for one call or stream; None: the connection has ended"""


class ReplicaLost(Exception):
    """The replica cannot be reached any more; what was under way there is lost."""


class Link:
    """An open connection to one start of one replica."""

    def __init__(self, wire: Wire[messages.FromReplica], member: Member, identity: Identity, on_news: OnNews | None) -> None:
        self.member = member
        self.identity = identity
        self._wire = wire
        self._on_news = on_news
        self._numbers = itertools.count(1)
        self._waiting: dict[int, _Waiting] = {}
        self._on_left: dict[int, OnLeft] = {}
        self.closed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._silence: asyncio.TimerHandle | None = None
        if on_news is not None:
            wire.send(messages.Watch())
            self._listen_for_silence()
        wire.listen(self._take, self.close)

    def close(self) -> None:
        """Everything under way here is lost."""
        if not self.closed.is_set():
            self.closed.set()
            self._wire.close()
            if self._silence is not None:
                self._silence.cancel()
            for answers in self._waiting.values():
                answers.put_nowait(None)
            for number in self._on_left.keys() - self._waiting.keys():
                self._end(number, None)

    async def generate(
        self,
        request: Request,
        session: str | None,
        uncached_tokens: int,
        source: messages.Source | None = None,
        on_left: OnLeft | None = None,
    ) -> AsyncGenerator[TokenEvent, None]:
        """As `Service.generate`; raises ReplicaLost too.

        `session`: what the router knows the conversation by; `uncached_tokens`: what it expects the replica to compute.
        `on_left`: as `on_end` there, of a request that is `traced`.
        """
        number = next(self._numbers)
        answers = self._begin(messages.Generate(number, request, session, uncached_tokens, source))
        if on_left is not None:
            self._on_left[number] = on_left
        unacknowledged, ended = 0, False
        try:
            while not ended:
                answer = await answers.get()
                if not isinstance(answer, TokenEvent):
                    ended = True
                    raise self._failure(answer)
                ended = answer.finish is not None
                unacknowledged += 1
                if unacknowledged == ACKNOWLEDGE_EVENTS:
                    self._wire.send(messages.Acknowledge(number, unacknowledged))
                    unacknowledged = 0
                yield answer
        finally:
            del self._waiting[number]
            if ended:
                self._on_left.pop(number, None)
            else:
                self._wire.send(messages.Cancel(number))
                self._leave(number, answers)

    async def locate(self, namespace: Namespace, tokens: array[int], *, deep: bool = False) -> Whereabouts:
        answer, _ = await self._call(messages.Located, messages.Locate(next(self._numbers), namespace, tokens.tobytes(), deep))
        return answer.found

    async def open_prefix(self, number: int, n_tokens: int) -> PrefixContent | None:
        """`number`: as the replica itself counts."""
        answer, _ = await self._call(messages.Opened, messages.OpenPrefix(next(self._numbers), number, n_tokens))
        return answer.content

    async def export(self, namespace: Namespace, tokens: array[int]) -> bytes:
        _, exported = await self._call(messages.Done, messages.Export(next(self._numbers), namespace, tokens.tobytes()))
        return exported

    async def restore(self, namespace: Namespace, tokens: array[int], exported: bytes, session: str | None = None) -> int:
        """As `Service.restore`, of nothing too. `session`: is at home there from now on, and all ingresses are told."""
        call = messages.Restore(next(self._numbers), namespace, tokens.tobytes(), session)
        answer, _ = await self._call(messages.Counted, call, exported)
        return answer.counts["tokens"]

    async def pin(self, namespace: Namespace, tokens: array[int]) -> int:
        """The number to give to `unpin`."""
        answer, _ = await self._call(messages.Done, messages.Pin(next(self._numbers), namespace, tokens.tobytes()))
        return answer.id

    def unpin(self, pin: int) -> None:
        self._wire.send(messages.Unpin(pin))

    def allow(self, namespace: Namespace, allowance: Allowance) -> None:
        self._wire.send(messages.Allow(namespace, allowance))

    def keep_for(self, seconds: Mapping[Namespace, float]) -> None:
        self._wire.send(messages.KeepFor(dict(seconds)))

    def anticipate(self, namespace: Namespace, tokens: array[int], *, typing: bool) -> None:
        self._wire.send(messages.Anticipate(namespace, tokens.tobytes(), typing))

    async def prefetch(self, namespace: Namespace, tokens: array[int]) -> None:
        await self._call(messages.Done, messages.Prefetch(next(self._numbers), namespace, tokens.tobytes()))

    async def verify(self) -> Verification:
        answer, _ = await self._call(messages.Counted, messages.Verify(next(self._numbers)))
        return Verification(**answer.counts)

    async def hand_over(self, members: list[Member]) -> dict[str, int]:
        """Have it take nothing new, finish what runs, and carry its conversations to these; returns what came of it."""
        answer, _ = await self._call(messages.Counted, messages.HandOver(next(self._numbers), tuple(members)))
        return answer.counts

    def ask_snapshot(self) -> None:
        self._wire.send(messages.AskSnapshot())

    # Inside

    def _leave(self, number: int, unread: _Waiting) -> None:
        """Nobody reads this stream any more; its end, which may have come, is heard of for a while."""
        while not unread.empty():
            self._unheard(number, unread.get_nowait())
        if number in self._on_left:
            self._loop.call_later(LAST_WORDS_SECONDS, self._end, number, None)

    def _unheard(self, number: int, answer: TokenEvent | tuple[messages.Answer, bytes] | None) -> None:
        """Something came for a stream that nobody reads any more."""
        if not isinstance(answer, TokenEvent):
            self._end(number, None)
        elif answer.finish is not None:
            self._end(number, answer.finish.usage)

    def _end(self, number: int, usage: Usage | None) -> None:
        """Tell who wants to know, once."""
        if (on_left := self._on_left.pop(number, None)) is not None:
            on_left(usage)

    async def _call(self, kind: type[_Answer], call: messages.Call, payload: bytes = b"") -> tuple[_Answer, bytes]:
        answers = self._begin(call, payload)
        try:
            answer = await answers.get()
        finally:
            del self._waiting[call.id]
        if isinstance(answer, tuple) and isinstance(answer[0], kind):
            return answer[0], answer[1]
        raise self._failure(answer)

    def _begin(self, frame: messages.Generate | messages.Call, payload: bytes = b"") -> _Waiting:
        if self.closed.is_set():
            raise ReplicaLost(self.member.replica)
        self._wire.send(frame, payload)
        answers: _Waiting = asyncio.Queue()
        self._waiting[frame.id] = answers
        return answers

    def _failure(self, answer: TokenEvent | tuple[messages.Answer, bytes] | None) -> Exception:
        """What it means that this came in place of what was asked for."""
        if isinstance(answer, tuple) and isinstance(answer[0], messages.Failed):
            return answer[0].error
        return ReplicaLost(self.member.replica)

    def _listen_for_silence(self) -> None:
        """Who has said nothing for too long counts as dead; looked at again when that could be so at the earliest."""
        ends_at = self._wire.heard_at + SILENCE_SECONDS
        if ends_at <= self._loop.time():
            self.close()
        else:
            self._silence = self._loop.call_at(ends_at, self._listen_for_silence)

    def _give(self, number: int, answer: TokenEvent | tuple[messages.Answer, bytes]) -> None:
        if number in self._waiting:
            self._waiting[number].put_nowait(answer)
        else:
            self._unheard(number, answer)

    def _take(self, frame: messages.FromReplica, payload: bytes) -> None:
        match frame:
            case messages.Events():
                for event in frame.events:
                    self._give(event.id, event.value)
            case messages.Located() | messages.Opened() | messages.Counted() | messages.Done() | messages.Failed():
                self._give(frame.id, (frame, payload))
            case messages.Ended(number, usage):
                self._end(number, usage)
            case messages.Delta() | messages.Snapshot() | messages.Homes() | messages.Statistics() | messages.Pulled():
                if self._on_news is not None:
                    self._on_news(frame, payload)
            case messages.Hello():
                self.close()  # a second one


async def open_link(member: Member, key: bytes, on_news: OnNews | None = None) -> Link:
    """Raises ReplicaLost where it cannot be reached, is somebody else by now, or does not have the key."""
    try:
        wire = await connect(member.host, member.port, key)
    except (ConnectionError, NotOfThisCluster) as error:
        raise ReplicaLost(f"{member.replica}: {error}") from error
    try:
        hello, _ = await asyncio.wait_for(wire.receive(), SILENCE_SECONDS)
    except (ConnectionError, TimeoutError) as error:
        wire.close()
        raise ReplicaLost(f"{member.replica}: {error}") from error
    if not isinstance(hello, messages.Hello) or (hello.replica, hello.epoch) != (member.replica, member.epoch):
        wire.close()
        raise ReplicaLost(f"{member.replica} has restarted")
    return Link(wire, member, hello.identity, on_news)
