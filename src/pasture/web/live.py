"""The live picture: one snapshot at a time, however many look.

Looks at the service's statistics when somebody asks and the last snapshot has aged, so nobody looking costs nothing, and a
hundred pages cost what one does. Rates and happenings come from the difference to the look before. On the event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable

import orjson

from pasture.core.ports import Clock
from pasture.core.statistics import PoolStatistics, SchedulerStatistics, ServiceStatistics
from pasture.web.happenings import Happening, between
from pasture.web.latency import Recent
from pasture.web.snapshot import Latencies, Rates, draw, rows

TICK_SECONDS = 0.5
MAX_HAPPENINGS = 40
RATE_SECONDS = 3.0
"""rates are of so long: an engine step can take longer than a tick"""
_FORGET_SECONDS = 10.0
"""after nobody looked for so long, what happened meanwhile is not news"""


class Live:
    def __init__(
        self,
        statistics: Callable[[], ServiceStatistics],
        model_name: Callable[[], str],
        clock: Clock,
        first_token: Recent,
        inter_token: Recent,
        tick_seconds: float = TICK_SECONDS,
    ) -> None:
        self._statistics = statistics
        self._model_name = model_name
        self._clock = clock
        self._first_token = first_token
        self._inter_token = inter_token
        self._tick = tick_seconds
        self._seen: ServiceStatistics | None = None
        self._seen_at = 0.0
        self._counted: deque[tuple[float, SchedulerStatistics]] = deque()
        self._happenings: deque[tuple[int, float, Happening]] = deque(maxlen=MAX_HAPPENINGS)
        self._n_happened = 0
        self._json = b""
        self._pool: PoolStatistics | None = None
        self._rows: dict[str, orjson.Fragment] = {}
        """of `_pool`, which stays the same while nothing runs"""
        self._more: dict[str, Callable[[], object]] = {}

    def add(self, name: str, value: Callable[[], object]) -> None:
        """Something else that each snapshot holds under that name, as JSON: what is not in one service's statistics."""
        self._more[name] = value

    def snapshot(self) -> bytes:
        """The present state as JSON, at most a tick old."""
        now = self._clock()
        if self._seen is None or now - self._seen_at >= self._tick * 0.9:
            self._look(now)
        return self._json

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Snapshots as server-sent events, one a tick, until the server drains."""
        while True:
            snapshot = self.snapshot()
            yield b"data: " + snapshot + b"\n\n"
            if self._seen is not None and self._seen.draining:
                return
            await asyncio.sleep(self._tick)

    def _look(self, now: float) -> None:
        statistics = self._statistics()
        seconds = now - self._seen_at
        if self._seen is None or seconds > _FORGET_SECONDS:
            self._counted.clear()
        else:
            self._note(self._seen, statistics)
        self._seen, self._seen_at = statistics, now
        latencies = Latencies(self._first_token.percentiles(), self._inter_token.percentiles())
        if statistics.pool is not self._pool:
            self._pool = statistics.pool
            self._rows = {name: orjson.Fragment(orjson.dumps(value)) for name, value in rows(statistics.pool).items()}
        picture = draw(statistics, latencies, self._rates(now, statistics.scheduler))
        picture |= self._rows
        picture["model"] = self._model_name()
        picture["happenings"] = [
            [number, round(now - moment, 1), happening.kind, happening.amount, happening.unit, happening.text]
            for number, moment, happening in reversed(self._happenings)
        ]
        picture |= {name: value() for name, value in self._more.items()}
        self._json = orjson.dumps(picture)

    def _rates(self, now: float, scheduler: SchedulerStatistics) -> Rates:
        self._counted.append((now, scheduler))
        while len(self._counted) > 2 and now - self._counted[1][0] >= RATE_SECONDS:
            self._counted.popleft()
        since, before = self._counted[0]
        seconds = max(now - since, 1e-9)
        return Rates(
            generated=(scheduler.generated_tokens_total - before.generated_tokens_total) / seconds,
            computed=(scheduler.computed_tokens_total - before.computed_tokens_total) / seconds,
            reused=(scheduler.cached_tokens_total - before.cached_tokens_total) / seconds,
        )

    def _note(self, before: ServiceStatistics, after: ServiceStatistics) -> None:
        for happening in between(before, after):
            self._n_happened += 1
            self._happenings.append((self._n_happened, self._clock(), happening))
