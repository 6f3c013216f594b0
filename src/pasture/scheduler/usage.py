"""How much of the engine each tenant has used lately, and who stands aside for whom.

    use = engine seconds of the tenant's rows, each second counting less as it ages, by weight

Turns in the waiting line are fair among those who are in line at the moment; somebody who comes now and then would still find
the machine full of what somebody else sent before. So whoever has used much more than another stands aside while that one has
a prompt to be computed: its own prompts wait, and few of its streams are in each step. As it does, the difference goes away.
While that one has none, its prompts are computed in short steps, which whoever comes next, and has used little, may interrupt.
Little use is no use: below `LITTLE` of the engine nobody stands aside. Engine thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from pasture.core.ports import Clock
from pasture.scheduler.task import Task

MEMORY_SECONDS = 60.0
"""after which a second of use counts 1/e"""
MUCH_MORE = 2.0
"""times another's use"""
LEAST_SECONDS = 2.0
"""that a share of the engine's time is a share of, however short the time that is remembered"""
LITTLE = 0.2
"""of the engine"""
ROWS_ASIDE = 16
"""who stands aside has one of so many of its streams in each step, in turn"""
FORGET = 1e-6
LATELY_SECONDS = 0.01
"""of use, as they count now: a request's second is less after five minutes"""


class Usage:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._now = self._since = clock()
        self._used: dict[str, float] = {}
        """tenant -> seconds, as they count at `_now`"""
        self._weights: dict[str, float] = {}
        self._turn = 0

    def charge(self, rows: Sequence[tuple[Task, int]], seconds: float) -> None:
        """A step of these rows took so long."""
        now, n_rows = self._clock(), sum(n for _, n in rows)
        fading = math.exp((self._now - now) / MEMORY_SECONDS)
        self._now = now
        self._used = {tenant: used * fading for tenant, used in self._used.items() if used > FORGET}
        for task, n in rows:
            tenant = task.request.tenant
            self._used[tenant] = self._used.get(tenant, 0.0) + seconds * n / n_rows
            self._weights[tenant] = task.request.allowance.weight
        if len(self._weights) > len(self._used):
            self._weights = {tenant: self._weights[tenant] for tenant in self._used}

    def of(self, task: Task) -> float:
        """Its tenant's use by weight, as a share of the engine's time."""
        return self._share(task.request.tenant, task.request.allowance.weight)

    def lately(self) -> set[str]:
        """The tenants that have used the engine lately."""
        return {tenant for tenant, used in self._used.items() if used > LATELY_SECONDS}

    def is_much(self, task: Task) -> bool:
        """Whether its tenant has used so much more than another has lately that whoever comes next should not wait for long."""
        if len(self._used) < 2:
            return False
        others = self.lately() - {task.request.tenant}
        least = min((self._share(tenant, self._weights[tenant]) for tenant in others), default=math.inf)
        return self.of(task) >= max(LITTLE, MUCH_MORE * least)

    def heavy(self, task: Task) -> frozenset[str]:
        """The tenants that have used too much to go before this task's: its own, and whoever used more than half as much."""
        most = self.of(task) / MUCH_MORE
        return frozenset(tenant for tenant in self._used if self._share(tenant, self._weights[tenant]) > most)

    def stands_aside(self, task: Task, others: list[Task]) -> bool:
        """Whether a task had better wait while others, whose tenants have used much less, are computed."""
        return bool(others) and len(self._used) > 1 and self.of(task) >= self._most(others)

    def aside_for(self, task: Task, others: Iterable[Task]) -> set[Task]:
        """Who of the others stands aside for a task."""
        if len(self._used) < 2:
            return set()
        most = self._most((task,))
        return {other for other in others if self.of(other) >= most}

    def first(self, tasks: list[Task]) -> list[Task]:
        """Of these tasks, all that need not stand aside for another of them."""
        if len(self._used) < 2 or len(tasks) < 2:
            return tasks
        most = self._most(tasks)
        return [task for task in tasks if self.of(task) < most]

    def thin_out(self, streams: list[Task], prompts: Iterable[Task]) -> list[Task]:
        """The streams for a step in which these prompts might be computed."""
        if len(self._used) < 2:
            return streams
        most = self._most(prompts)
        aside = [task for task in streams if self.of(task) >= most]
        if not aside:
            return streams
        n = -(-len(aside) // ROWS_ASIDE)
        self._turn = (self._turn + n) % len(aside)
        chosen = {id(task) for task in (aside + aside)[self._turn : self._turn + n]}
        return [task for task in streams if id(task) in chosen or self.of(task) < most]

    def _share(self, tenant: str, weight: float) -> float:
        remembered = MEMORY_SECONDS * (1 - math.exp(-max(LEAST_SECONDS, self._now - self._since) / MEMORY_SECONDS))
        return self._used.get(tenant, 0.0) / remembered / weight

    def _most(self, tasks: Iterable[Task]) -> float:
        """Use from which on somebody stands aside for one of these tasks; infinite for none."""
        return max(LITTLE, MUCH_MORE * min((self.of(task) for task in tasks), default=math.inf))
