"""A tenant's turnstile: how many of its replies are being made, how many requests wait for that, and how many tokens a minute.

Every reply of a request takes a place of its own. Nobody knows a reply's length, so a request comes in while the bucket is not
empty, and what it will probably need is set aside for it at once: others that come with it find the bucket as if that were
gone. What it uses is paid as it goes; what it used less is there again when it leaves. A request may need more than was set
aside, and overdraw the bucket; the next one waits until it has filled up again. Limits change while requests run and wait: the
latest that anybody came with hold for all of them. Everything here belongs to the event loop's thread, and a tenant that has
nothing running and a full bucket is forgotten.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field

from pasture.core.errors import RateLimited, RequestError
from pasture.core.ports import Clock
from pasture.sessions.values import Limits, Tenant

QUEUE_RETRY_SECONDS = 2.0
SECONDS_A_MINUTE = 60.0


@dataclass(slots=True)
class _Bucket:
    """Tokens a minute: what is spent comes back with time."""

    clock: Clock
    filled_at: float
    rate: int | None = None
    """None: no limit, as far as is known"""
    spent: float = 0.0
    """tokens that it lacks"""
    promised: int = 0
    """tokens set aside for those who have come in"""

    def fill(self, rate: int | None) -> None:
        """Put back what has come since the last time; `rate` holds from here on."""
        now = self.clock()
        if self.rate is not None:
            self.spent = max(0.0, self.spent - (now - self.filled_at) * self.rate / SECONDS_A_MINUTE)
        self.rate, self.filled_at = rate, now
        if rate is None:
            self.spent = 0.0

    @contextmanager
    def set_aside(self, tokens: int) -> Iterator[Passage]:
        """So many for one request, within the block. Raises RateLimited while the bucket is empty."""
        if self.rate is not None and self.spent + self.promised >= self.rate:
            seconds = (self.spent + self.promised - self.rate) * SECONDS_A_MINUTE / self.rate
            raise RateLimited(f"more than {self.rate} tokens in a minute", retry_after_seconds=seconds)
        self.promised += tokens
        passage = Passage(self, tokens)
        try:
            yield passage
        finally:
            self.promised -= passage.left


@dataclass(slots=True)
class Passage:
    """One request that came in. Whoever holds it pays for what it used."""

    bucket: _Bucket
    left: int
    """of what was set aside for it"""

    def pay(self, tokens: int) -> None:
        """So many more were used."""
        bucket = self.bucket
        if bucket.rate is not None:
            bucket.fill(bucket.rate)
            bucket.spent += tokens
        from_promise = min(tokens, self.left)
        self.left -= from_promise
        bucket.promised -= from_promise


@dataclass(slots=True)
class _Turnstile:
    bucket: _Bucket
    most: int | None = None
    """replies that may be made at once, as far as is known"""
    running: int = 0
    waiting: deque[tuple[asyncio.Future[None], int]] = field(default_factory=deque)
    """with how many places each needs"""


class Gate:
    """Every tenant's turnstile."""

    def __init__(self, *, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._turnstiles: dict[str, _Turnstile] = {}

    def __len__(self) -> int:
        return len(self._turnstiles)

    @asynccontextmanager
    async def enter(self, tenant: Tenant, *, replies: int = 1, tokens: int = 0) -> AsyncIterator[Passage]:
        """Wait for a place for each reply and hold them for the block; `tokens` is what it will probably use.

        Raises RateLimited instead of waiting longer than the limits allow, and RequestError for more replies than may ever be
        made at once. A cancellation while waiting, or in the block, gives everything back.
        """
        limits = tenant.limits
        if limits.max_concurrent is not None and replies > limits.max_concurrent:
            raise RequestError(
                f"{replies} replies in one request; {tenant.name} may have {limits.max_concurrent} made at once", param="n"
            )
        turnstile = self._turnstiles.get(tenant.name)
        if turnstile is None:
            turnstile = self._turnstiles[tenant.name] = _Turnstile(_Bucket(self._clock, self._clock()))
        turnstile.most = limits.max_concurrent
        self._admit(turnstile)
        turnstile.bucket.fill(limits.tokens_per_minute)
        try:
            with turnstile.bucket.set_aside(tokens) as passage:
                await self._take_places(turnstile, limits, replies)
                try:
                    yield passage
                finally:
                    self._leave(turnstile, replies)
        finally:
            self._forget(tenant.name, turnstile)

    @classmethod
    async def _take_places(cls, turnstile: _Turnstile, limits: Limits, replies: int) -> None:
        if not turnstile.waiting and _has_places(turnstile, replies):
            turnstile.running += replies
            return
        if len(turnstile.waiting) >= limits.max_queued:
            raise RateLimited(
                f"{limits.max_concurrent} replies are being made and {limits.max_queued} requests wait already",
                retry_after_seconds=QUEUE_RETRY_SECONDS,
            )
        place = asyncio.get_running_loop().create_future()
        turnstile.waiting.append((place, replies))
        try:
            await place
        except BaseException:
            if place.done() and not place.cancelled():
                cls._leave(turnstile, replies)  # they were given to us as we went
            else:
                with suppress(ValueError):  # who admits others passes over those that have gone
                    turnstile.waiting.remove((place, replies))
                cls._admit(turnstile)  # who stood behind us may need fewer
            raise

    @classmethod
    def _leave(cls, turnstile: _Turnstile, replies: int) -> None:
        turnstile.running -= replies
        cls._admit(turnstile)

    @staticmethod
    def _admit(turnstile: _Turnstile) -> None:
        """Those who wait get what places there are, in their order."""
        while turnstile.waiting and _has_places(turnstile, turnstile.waiting[0][1]):
            place, replies = turnstile.waiting.popleft()
            if not place.done():
                place.set_result(None)
                turnstile.running += replies

    def _forget(self, name: str, turnstile: _Turnstile) -> None:
        used = turnstile.running or turnstile.waiting or turnstile.bucket.spent
        if not used and self._turnstiles.get(name) is turnstile:  # who was passed over may be the last to come here
            del self._turnstiles[name]


def _has_places(turnstile: _Turnstile, replies: int) -> bool:
    """Whether there are so many; where nothing runs there are, so that nobody waits for ever once a limit was lowered."""
    return turnstile.most is None or not turnstile.running or turnstile.running + replies <= turnstile.most
