"""Eviction and admission by expected saving: uses a second x what a use saves, per byte kept.

How often a block will be used is the reuse model's answer. What a use saves is what it would take to have the block otherwise:
to compute it, which grows with its depth because a token attends to everything before it, or to fetch it from the tier behind
this one, where one takes what goes from here and that is less. Values change as time passes
without anything being used, so the order is made anew every few seconds; in between, who comes up for eviction is valued again,
which catches all that rose. A block that is worth no more than the least of what is there is not let in: one-hit wonders do not
displace what has proven itself.

Owned by one tier, under its lock. Making the order anew costs about 5 us a leaf, so a thousandth of the time at most.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from itertools import count

from pasture.core.ports import Clock
from pasture.core.storage import BlockKey
from pasture.core.values import Kind
from pasture.foresight.reuse import ReuseModel
from pasture.tiers.entries import Entry
from pasture.tiers.eviction import Wanted

ORDER_SECONDS = 1.0
"""between two orders"""
LEAVES_A_SECOND = 50
"""orders come more rarely when there are more leaves than this allows"""
FRESH_LEAVES = 4_096
"""that are not in order yet, at most"""
ATTENTION_TOKENS = 65_536.0
"""depth at which a token costs twice what the first one does"""

FetchPrice = Callable[[], float]
"""what a token takes to be fetched from the tier behind, where computing it takes 1"""


def nothing_behind() -> float:
    return math.inf


class ExpectedSaving:
    def __init__(
        self, wanted: Wanted, clock: Clock, model: ReuseModel | None = None, fetch_price: FetchPrice = nothing_behind
    ) -> None:
        self.model = model if model is not None else ReuseModel()
        self._wanted = wanted
        self._clock = clock
        self._fetch_price = fetch_price
        self._price = fetch_price()
        """as the present order has it"""
        self._leaves: dict[int, Entry] = {}
        """whoever was offered, by identity; some may have stopped being leaves"""
        self._heap: list[tuple[float, int, Entry]] = []
        """(value when it was pushed, turn, entry); an entry may be in it several times"""
        self._fresh: list[Entry] = []
        """offered since the last victim was wanted: most of them are no leaves any more by then"""
        self._least: tuple[Entry | None, float] = (None, 0.0)
        """who was the victim last, and with what value"""
        self._turn = count()
        self._next_order = clock()
        self._sweep_at = FRESH_LEAVES

    def arrived(self, path: Sequence[BlockKey]) -> None:
        self.model.arrived(path, self._clock())

    def finished(self, path: Sequence[BlockKey], kind: Kind) -> None:
        self.model.finished(path, kind, self._clock())

    def entered(self, entry: Entry) -> None:
        address = entry.block.address
        self.model.adopt(address.key, address.parent)

    def removed(self, entry: Entry) -> None:
        self._leaves.pop(id(entry), None)

    def used(self, entries: Sequence[Entry]) -> None: ...

    def offered(self, entry: Entry) -> None:
        self._fresh.append(entry)
        if len(self._fresh) > FRESH_LEAVES:
            self._take_in(self._clock())

    def victim(self) -> Entry | None:
        now = self._clock()
        if now >= self._next_order:
            self._make_order(now)
        self._take_in(now)
        heap, leaves = self._heap, self._leaves
        while heap:
            value, _, entry = heap[0]
            if id(entry) not in leaves or not self._wanted(entry):
                heapq.heappop(heap)
                leaves.pop(id(entry), None)
                continue
            valued = self.value(entry, now)
            if valued > value:
                heapq.heapreplace(heap, (valued, next(self._turn), entry))
                continue
            heapq.heappop(heap)
            del leaves[id(entry)]
            self._least = (entry, value)
            return entry
        return None

    def admits(self, newcomer: Entry, victim: Entry) -> bool:
        now = self._clock()
        known, value = self._least
        return self.value(newcomer, now) > (value if known is victim else self.value(victim, now))

    def expects(self, key: BlockKey) -> float:
        now = self._clock()
        self._refresh(now)
        return self.model.rate(key, now)

    def value(self, entry: Entry, now: float) -> float:
        """Seconds saved per second and byte, in units of what a token takes to compute on this machine at depth 0."""
        address = entry.block.address
        p0 = address.p0
        cost = (address.p1 - p0) * min(1 + p0 / ATTENTION_TOKENS, self._price)
        return self.model.rate(address.key, now) * cost / entry.size

    def _take_in(self, now: float) -> None:
        fresh, self._fresh = self._fresh, []
        for entry in filter(self._wanted, fresh):
            self._leaves[id(entry)] = entry
            heapq.heappush(self._heap, (self.value(entry, now), next(self._turn), entry))
        if len(self._heap) > self._sweep_at:  # where nobody asks for a victim, what has left would pile up
            self._value_anew(now)

    def _refresh(self, now: float) -> None:
        if now >= self.model.refreshed_at + ORDER_SECONDS:
            self.model.refresh(now)

    def _make_order(self, now: float) -> None:
        self._refresh(now)
        self._price = self._fetch_price()
        self._value_anew(now)
        self._next_order = now + max(ORDER_SECONDS, len(self._leaves) / LEAVES_A_SECOND)

    def _value_anew(self, now: float) -> None:
        """Every leaf that is still one, once."""
        self._leaves = {name: entry for name, entry in self._leaves.items() if self._wanted(entry)}
        self._heap = [(self.value(entry, now), next(self._turn), entry) for entry in self._leaves.values()]
        heapq.heapify(self._heap)
        self._sweep_at = 2 * len(self._heap) + FRESH_LEAVES
