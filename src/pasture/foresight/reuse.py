"""Which blocks will be wanted again, and when: the reuse model, online, from nothing but the keys of the requests so far.

    visit            one request's way through its blocks; each block remembers the last visit that came through it
    conversation     a request that begins with an earlier one's prompt continues it: turn, turn + 1, ...
    category         what is expected next (a person, a tool, nothing) x how many turns the conversation has had: `returns`
    shared prefix    a block that other conversations' requests come through too has an arrival rate of its own

What tells conversations apart is where they part. A next turn has the whole earlier prompt before it, but for the last block,
where the reply began. A stranger with the same system prompt leaves the earlier prompt before that, and from then on the blocks
that both have are known to be common: they do not show whose conversation goes on. An earlier request that still runs has no
next turn yet. A turn that was rewritten far back counts as a conversation of its own.

Keys are remembered whether or not any tier has the blocks, so a conversation whose KV was dropped is recognised when it comes
back. Everything is bounded: so many keys, so many rates, the least recently used forgotten. What a block's second in the cache
is worth is the sum of both kinds of knowledge. Learns from the past only, knows no tier; belongs to its owner's thread.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from pasture.core.storage import BlockKey
from pasture.core.values import Kind
from pasture.foresight.returns import Returns, Wait

REMEMBERED_KEYS = 1 << 17
REMEMBERED_RATES = 1 << 14
TURNS = 8
"""turns of a conversation that are told apart; later ones count as the last of them"""
REMEMBERED_REQUESTS = 1 << 13
"""of those that run; the oldest are forgotten"""
RATE_SECONDS = 600.0
"""over which arrival rates are averaged"""
LEFT_BEHIND = 0.05
"""what is left of a block's chances when its conversation went on without it"""

_KINDS = {kind: number for number, kind in enumerate(Kind)}
_GROUPS = [kind for kind in _KINDS.values() for _ in range(TURNS)]
"""category -> kind"""


@dataclass(slots=True, eq=False)
class Visit:
    """A request's way through its blocks."""

    n_blocks: int
    """of its prompt; the last may be short"""
    turn: int
    """0 for the first request of a conversation"""
    kind: Kind
    wait: Wait
    n_running: int = 0
    """answers that are still being computed; the wait begins when there are none"""
    rate: float = 0.0
    valued_at: int = 0
    """number of the refresh since which `rate` stands"""


@dataclass(slots=True)
class _Arrivals:
    """A rate that fades: requests of other conversations, each counting less as it ages."""

    count: float
    last: float

    def rate(self, now: float) -> float:
        return self.count * math.exp((self.last - now) / RATE_SECONDS) / RATE_SECONDS

    def add(self, now: float) -> None:
        self.count = self.count * math.exp((self.last - now) / RATE_SECONDS) + 1
        self.last = now


class ReuseModel:
    """See the module."""

    def __init__(self, *, remembered_keys: int = REMEMBERED_KEYS) -> None:
        self._remembered_keys = remembered_keys
        self.returns = Returns(_GROUPS)
        self._visits: OrderedDict[BlockKey, Visit] = OrderedDict()
        """block -> the last visit that came through, longest ago first"""
        self._running: OrderedDict[BlockKey, list[Visit]] = OrderedDict()
        """the last block of a prompt that is surely whole -> who runs from there, first come first"""
        self._arrivals: OrderedDict[BlockKey, _Arrivals] = OrderedDict()
        self._refreshes = 1
        self.refreshed_at = -math.inf

    # The past

    def arrived(self, path: Sequence[BlockKey], now: float) -> Visit:
        """A request over these blocks begins; `path` is a whole prefix, from its first block on."""
        self.returns.advance(now)
        visit = self._same(path) or self._begin(path, now)
        visit.n_running += 1
        if path:
            self._running.setdefault(_last_whole(path), []).append(visit)
            while len(self._running) > REMEMBERED_REQUESTS:
                self._running.popitem(last=False)
        return visit

    def finished(self, path: Sequence[BlockKey], kind: Kind, now: float) -> None:
        """A request has ended, `path` has its reply too: from here on `kind` is waited for. What the reply added is its own."""
        visit = self._end(path)
        if visit is None:
            return
        for key in path[visit.n_blocks - 1 :]:
            self._visits.setdefault(key, visit)
        visit.kind = kind
        visit.n_running -= 1
        visit.wait.category = _category(kind, visit.turn)
        visit.wait.since = now
        visit.valued_at = 0
        if not visit.n_running:
            self.returns.advance(now)
            self.returns.begin(visit.wait)

    def adopt(self, key: BlockKey, parent: BlockKey) -> None:
        """A block was stored that no request has asked for yet: what a reply added belongs to whoever it was given to."""
        if key not in self._visits:
            visit = self._visits.get(parent)
            if visit is not None:
                self._visits[key] = visit

    def continued(self, path: Sequence[BlockKey]) -> Visit | None:
        """The visit that this one goes on from."""
        for index in range(len(path) - 1, -1, -1):
            visit = self._visits.get(path[index])
            if visit is not None:
                contained = index + 1 >= visit.n_blocks - 1
                return visit if contained and not visit.n_running and path[index] not in self._arrivals else None
        return None

    # The future

    def refresh(self, now: float) -> None:
        """Draw conclusions from what came since the last time: until then, rates stand still."""
        self.returns.advance(now)
        self.returns.refresh()
        self._refreshes += 1
        self.refreshed_at = now

    def rate(self, key: BlockKey, now: float) -> float:
        """Uses a second that keeping the block is expected to bring, at best."""
        visit = self._visits.get(key)
        rate = 0.0
        if visit is not None:
            rate = visit.rate if visit.valued_at == self._refreshes else self._value(visit, now)
        arrivals = self._arrivals.get(key)
        return rate if arrivals is None else rate + arrivals.rate(now)

    def probability(self, key: BlockKey, now: float, within_seconds: float) -> float:
        """P(the block is used within so many seconds)."""
        unused = 1.0
        visit = self._visits.get(key)
        if visit is not None:
            wait = visit.wait
            returns = self.returns.probability(wait.category, now - wait.since, within_seconds)
            unused -= returns * LEFT_BEHIND if wait.over else returns
        arrivals = self._arrivals.get(key)
        return 1 - unused * math.exp(-within_seconds * arrivals.rate(now)) if arrivals is not None else 1 - unused

    def arrival_rate(self, key: BlockKey, now: float) -> float:
        """Requests a second, of conversations other than the last one, that come through the block."""
        arrivals = self._arrivals.get(key)
        return arrivals.rate(now) if arrivals is not None else 0.0

    # Inside

    def _same(self, path: Sequence[BlockKey]) -> Visit | None:
        """The visit with just this prompt that still runs: somebody wants several answers."""
        visit = self._visits.get(path[-1]) if path else None
        return visit if visit is not None and visit.n_running and visit.n_blocks == len(path) else None

    def _begin(self, path: Sequence[BlockKey], now: float) -> Visit:
        before = self.continued(path)
        kind, turn = Kind.CHAT, 0
        if before is not None:
            self.returns.end(before.wait, now)
            before.valued_at = 0
            kind, turn = before.kind, before.turn + 1
        visit = Visit(len(path), turn, kind, Wait(_category(kind, turn), now))
        visits = self._visits
        for key in path:
            last = visits.pop(key, None)
            visits[key] = visit
            if last is not None and last is not before:
                self._count_arrival(key, now)
        while len(visits) > self._remembered_keys:
            visits.popitem(last=False)
        return visit

    def _end(self, path: Sequence[BlockKey]) -> Visit | None:
        """Take out the first to come of those that run and whose prompt reaches farthest into these blocks."""
        for key in reversed(path):
            running = self._running.get(key)
            if running is not None:
                visit = running.pop(0)
                if not running:
                    del self._running[key]
                return visit
        return None

    def _value(self, visit: Visit, now: float) -> float:
        wait = visit.wait
        rate = self.returns.index(wait.category, now - wait.since)
        visit.rate = rate * LEFT_BEHIND if wait.over else rate
        visit.valued_at = self._refreshes
        return visit.rate

    def _count_arrival(self, key: BlockKey, now: float) -> None:
        arrivals = self._arrivals.pop(key, None)
        if arrivals is None:
            arrivals = _Arrivals(0.0, now)
            if len(self._arrivals) >= REMEMBERED_RATES:
                self._arrivals.popitem(last=False)
        arrivals.add(now)
        self._arrivals[key] = arrivals


def _last_whole(path: Sequence[BlockKey]) -> BlockKey:
    return path[max(0, len(path) - 2)]


def _category(kind: Kind, turn: int) -> int:
    return _KINDS[kind] * TURNS + min(turn, TURNS - 1)
