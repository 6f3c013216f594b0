"""A tenant's turnstile: how many of its requests are at the scheduler, how many wait for that, and how many tokens a minute.

Tokens are paid afterwards, because nobody knows a reply's length: a request enters while the bucket is not empty and may
overdraw it; the next one waits until it has filled up again. Limits change while requests run and wait: the latest that anybody
came with hold for all of them. Everything here belongs to the event loop's thread, and a tenant that has nothing running and a
full bucket is forgotten.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from pasture.core.errors import RateLimited
from pasture.core.ports import Clock
from pasture.sessions.values import Limits, Tenant

QUEUE_RETRY_SECONDS = 2.0
SECONDS_A_MINUTE = 60.0


@dataclass(slots=True)
class Passage:
    """One request that was let in. Whoever holds it says what it used."""

    tokens: int = 0


@dataclass(slots=True)
class _Turnstile:
    most: int | None = None
    """that may run, as far as is known"""
    running: int = 0
    waiting: deque[asyncio.Future[None]] = field(default_factory=deque)
    spent: float = 0.0
    """tokens that the bucket lacks"""
    filled_at: float = 0.0


class Gate:
    """Every tenant's turnstile."""

    def __init__(self, *, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._turnstiles: dict[str, _Turnstile] = {}

    def __len__(self) -> int:
        return len(self._turnstiles)

    @asynccontextmanager
    async def enter(self, tenant: Tenant) -> AsyncIterator[Passage]:
        """Wait for a place and hold it for the block. Raises RateLimited instead of waiting longer than the limits allow.

        A cancellation while waiting, or in the block, gives everything back.
        """
        limits = tenant.limits
        turnstile = self._turnstiles.setdefault(tenant.name, _Turnstile(filled_at=self._clock()))
        turnstile.most = limits.max_concurrent
        self._admit(turnstile)
        try:
            self._check_tokens(turnstile, limits)
            await self._take_place(turnstile, limits)
        except BaseException:
            self._forget(tenant.name, turnstile)
            raise
        passage = Passage()
        try:
            yield passage
        finally:
            turnstile.spent += passage.tokens if limits.tokens_per_minute is not None else 0
            self._leave(turnstile)
            self._forget(tenant.name, turnstile)

    def _check_tokens(self, turnstile: _Turnstile, limits: Limits) -> None:
        rate = limits.tokens_per_minute
        now = self._clock()
        if rate is None:
            turnstile.spent = 0.0
            return
        turnstile.spent = max(0.0, turnstile.spent - (now - turnstile.filled_at) * rate / SECONDS_A_MINUTE)
        turnstile.filled_at = now
        if turnstile.spent >= rate:
            seconds = (turnstile.spent - rate) * SECONDS_A_MINUTE / rate
            raise RateLimited(f"more than {rate} tokens in a minute", retry_after_seconds=seconds)

    @classmethod
    async def _take_place(cls, turnstile: _Turnstile, limits: Limits) -> None:
        if not turnstile.waiting and _has_place(turnstile):
            turnstile.running += 1
            return
        if len(turnstile.waiting) >= limits.max_queued:
            raise RateLimited(
                f"{limits.max_concurrent} requests run and {limits.max_queued} wait already",
                retry_after_seconds=QUEUE_RETRY_SECONDS,
            )
        place = asyncio.get_running_loop().create_future()
        turnstile.waiting.append(place)
        try:
            await place
        except BaseException:
            if place.done() and not place.cancelled():
                cls._leave(turnstile)  # it was given to us as we went
            else:
                with suppress(ValueError):  # who admits others passes over those that have gone
                    turnstile.waiting.remove(place)
            raise

    @classmethod
    def _leave(cls, turnstile: _Turnstile) -> None:
        turnstile.running -= 1
        cls._admit(turnstile)

    @staticmethod
    def _admit(turnstile: _Turnstile) -> None:
        """Those who wait get what places there are, in their order."""
        while turnstile.waiting and _has_place(turnstile):
            place = turnstile.waiting.popleft()
            if not place.done():
                place.set_result(None)
                turnstile.running += 1

    def _forget(self, name: str, turnstile: _Turnstile) -> None:
        used = turnstile.running or turnstile.waiting or turnstile.spent
        if not used and self._turnstiles.get(name) is turnstile:  # who was passed over may be the last to come here
            del self._turnstiles[name]


def _has_place(turnstile: _Turnstile) -> bool:
    return turnstile.most is None or turnstile.running < turnstile.most
