"""A waiting line that is fair between tenants and, inside a tenant, between users.

Deficit round robin (Shreedhar and Varghese, 1995) on two levels. Every flow has a deficit in tokens; a request may start when
its flow's deficit covers its cost, and is charged for it. When nobody's deficit suffices, every flow with someone in line gets
the same number of quanta, the fewest that let somebody start. The line does not say who of those goes first: the scheduler
chooses among them (shortest first), which is what makes short turns quick without letting anyone starve. An empty flow is
forgotten. A tenant's weight multiplies its quanta; priorities order a tenant's own requests and give nobody more than that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from pasture.scheduler.task import Task

QUANTUM_TOKENS = 256
SCAN_PER_USER = 16
"""how far into one user's line to look for somebody who is ready"""
MAX_OFFERED = 64
"""users looked at for one choice, longest-waiting first"""

Ready = Callable[[Task], bool]
Cost = Callable[[Task], int]


@dataclass(slots=True)
class _User:
    line: dict[Task, None] = field(default_factory=dict)
    """tasks in order of arrival; a dict for removal in the middle"""
    deficit: float = 0.0


@dataclass(slots=True)
class _Tenant:
    users: dict[str, _User] = field(default_factory=dict)
    deficit: float = 0.0
    weight: float = 1.0


class FairQueue:
    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Task]:
        for tenant in self._tenants.values():
            for user in tenant.users.values():
                yield from user.line

    def push(self, task: Task) -> None:
        tenant = self._tenants.setdefault(task.request.tenant, _Tenant())
        tenant.weight = task.request.weight
        tenant.users.setdefault(task.request.user, _User()).line[task] = None
        self._size += 1

    def remove(self, task: Task, charge_tokens: int = 0) -> None:
        """Take a task out of the line; charged when it starts, not when it is cancelled. Raises KeyError when it is not in."""
        tenant = self._tenants[task.request.tenant]
        user = tenant.users[task.request.user]
        del user.line[task]
        self._size -= 1
        user.deficit -= charge_tokens
        tenant.deficit -= charge_tokens
        if not user.line:
            del tenant.users[task.request.user]
            if not tenant.users:
                del self._tenants[task.request.tenant]

    def __contains__(self, task: Task) -> bool:
        tenant = self._tenants.get(task.request.tenant)
        user = tenant.users.get(task.request.user) if tenant is not None else None
        return user is not None and task in user.line

    def eligible(self, ready: Ready, cost: Cost) -> list[Task]:
        """One task a user whose turn it may be now. Adds quanta where nobody could start; empty when nobody is ready."""
        able: list[tuple[_Tenant, Task, int]] = []
        asking: list[_Tenant] = []
        for tenant in self._tenants.values():
            offers = self._offers(tenant, ready, cost, MAX_OFFERED - len(able))
            if offers:
                asking.append(tenant)
                able += offers
        if not able:
            return []
        rounds = min(_rounds(tenant.deficit, tokens, tenant.weight) for tenant, _, tokens in able)
        for tenant in asking:
            tenant.deficit += rounds * QUANTUM_TOKENS * tenant.weight
        return [task for tenant, task, tokens in able if tenant.deficit >= tokens]

    @staticmethod
    def _offers(tenant: _Tenant, ready: Ready, cost: Cost, most: int) -> list[tuple[_Tenant, Task, int]]:
        """The tasks that fairness inside the tenant lets go next, at least one where anybody is ready."""
        able: list[tuple[_User, Task]] = []
        for user in islice(tenant.users.values(), max(0, most)):
            line = sorted(islice(user.line, SCAN_PER_USER), key=lambda task: -task.request.priority)
            task = next((task for task in line if ready(task)), None)
            if task is not None:
                able.append((user, task))
        if not able:
            return []
        urgent = max(task.request.priority for _, task in able)
        heads = [(user, task, cost(task)) for user, task in able if task.request.priority == urgent]
        rounds = min(_rounds(user.deficit, tokens, 1.0) for user, _, tokens in heads)
        for user, _, _ in heads:
            user.deficit += rounds * QUANTUM_TOKENS
        return [(tenant, task, tokens) for user, task, tokens in heads if user.deficit >= tokens]


def _rounds(deficit: float, tokens: int, weight: float) -> int:
    return max(0, math.ceil((tokens - deficit) / (QUANTUM_TOKENS * weight)))
