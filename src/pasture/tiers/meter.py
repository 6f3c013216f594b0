"""What a policy costs: an eviction policy like the one inside it, which counts the CPU time of every call.

Two readings of the thread's own clock a call, about a microsecond, so waiting for the interpreter or another core does not
count. Called under its tier's lock; `seconds` may be read by any thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

from pasture.core.ports import Clock
from pasture.core.storage import BlockKey
from pasture.core.values import Kind
from pasture.tiers.entries import Entry
from pasture.tiers.eviction import EvictionPolicy, PolicyMaker, Wanted

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


class Meter:
    """Makes policies that are metered together."""

    def __init__(self, clock: Clock = time.thread_time) -> None:
        self.seconds = 0.0
        self._clock = clock

    def around(self, maker: PolicyMaker) -> PolicyMaker:
        return lambda wanted: Metered(maker, wanted, self)

    def measure(self, call: Callable[Arguments, Answer], *arguments: Arguments.args, **named: Arguments.kwargs) -> Answer:
        started = self._clock()
        try:
            return call(*arguments, **named)
        finally:
            self.seconds += self._clock() - started


class Metered:
    """See the module and `EvictionPolicy`."""

    def __init__(self, maker: PolicyMaker, wanted: Wanted, meter: Meter) -> None:
        self._policy: EvictionPolicy = maker(wanted)
        self._measure = meter.measure

    def arrived(self, path: Sequence[BlockKey]) -> None:
        self._measure(self._policy.arrived, path)

    def finished(self, path: Sequence[BlockKey], kind: Kind) -> None:
        self._measure(self._policy.finished, path, kind)

    def entered(self, entry: Entry) -> None:
        self._measure(self._policy.entered, entry)

    def removed(self, entry: Entry) -> None:
        self._measure(self._policy.removed, entry)

    def used(self, entries: Sequence[Entry]) -> None:
        self._measure(self._policy.used, entries)

    def offered(self, entry: Entry) -> None:
        self._measure(self._policy.offered, entry)

    def victim(self) -> Entry | None:
        return self._measure(self._policy.victim)

    def admits(self, newcomer: Entry, victim: Entry) -> bool:
        return self._measure(self._policy.admits, newcomer, victim)

    def expects(self, key: BlockKey) -> float:
        return self._measure(self._policy.expects, key)
