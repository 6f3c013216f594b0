"""A waiting line that is fair between tenants and, inside a tenant, between users.

Deficit round robin (Shreedhar and Varghese, 1995) on two levels. Every flow has a deficit in tokens; a request may start when
its flow's deficit covers its cost, and is charged for it. When nobody's deficit suffices, every flow with someone in line gets
the same number of quanta, the fewest that let somebody start. The line does not say who of those goes first: the scheduler
chooses among them (shortest first), which is what makes short turns quick without letting anyone starve. An empty flow is
forgotten. A tenant's weight multiplies its quanta. Only those take part whom nobody who is ready goes before: a higher priority
goes first whoever it is from, which is why a tenant's requests have no higher one than the operator allows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice, zip_longest

from pasture.scheduler.task import Task

QUANTUM_TOKENS = 256
SCAN_PER_USER = 16
"""how far into one user's line to look for somebody who is ready"""
MAX_OFFERED = 64
"""users looked at for one choice, longest-waiting first, the same number of each tenant and one at least"""

Ready = Callable[[Task], bool]
Cost = Callable[[Task], int]
Urgency = Callable[[Task], int]
First = Callable[[list[Task]], list[Task]]
"""of these, who need not let another of them go before"""


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
        self._priorities: Counter[int] = Counter()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Task]:
        for tenant in self._tenants.values():
            for user in tenant.users.values():
                yield from user.line

    @property
    def highest_priority(self) -> int:
        """Of those in line; 0 for an empty line."""
        return max(self._priorities, default=0)

    def weights(self) -> Iterator[tuple[str, float]]:
        """Tenants with somebody in line."""
        return ((name, tenant.weight) for name, tenant in self._tenants.items())

    def heads(self) -> Iterator[Task]:
        """Somebody of each tenant in line."""
        return (task for tenant in self._tenants.values() for task in islice(next(iter(tenant.users.values())).line, 1))

    def next_of_each(self, most: int) -> list[Task]:
        """The first in line of each user, so many at most: every tenant's first user, then their second ones."""
        rows = zip_longest(*(islice(tenant.users.values(), most) for tenant in self._tenants.values()))
        users = (user for row in rows for user in row if user is not None)
        return [next(iter(user.line)) for user in islice(users, most)]

    def push(self, task: Task) -> None:
        tenant = self._tenants.setdefault(task.request.tenant, _Tenant())
        tenant.weight = task.request.allowance.weight
        tenant.users.setdefault(task.request.user, _User()).line[task] = None
        self._priorities[task.request.priority] += 1
        self._size += 1

    def remove(self, task: Task, charge_tokens: int = 0) -> None:
        """Take a task out of the line; charged when it starts, not when it is cancelled. Raises KeyError when it is not in."""
        tenant = self._tenants[task.request.tenant]
        user = tenant.users[task.request.user]
        del user.line[task]
        self._size -= 1
        self._priorities[task.request.priority] -= 1
        self._priorities += Counter()  # forgets what nobody in line has
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

    def eligible(self, ready: Ready, cost: Cost, urgency: Urgency, first: First) -> list[Task]:
        """One task a user whose turn it may be now. Adds quanta where nobody could start; empty when nobody is ready."""
        most = max(1, MAX_OFFERED // max(1, len(self._tenants)))
        offers = [(tenant, _offers(tenant, ready, urgency, most)) for tenant in self._tenants.values()]
        going = {id(task) for task in first([task for _, able in offers for _, task in able])}
        chosen: list[tuple[_Tenant, Task, int]] = []
        for tenant, able in offers:
            heads = [(user, task, cost(task)) for user, task in able if id(task) in going]
            chosen += [(tenant, task, tokens) for task, tokens in _turns(heads)]
        if not chosen:
            return []
        rounds = min(_rounds(tenant.deficit, tokens, tenant.weight) for tenant, _, tokens in chosen)
        for tenant in {id(tenant): tenant for tenant, _, _ in chosen}.values():
            tenant.deficit += rounds * QUANTUM_TOKENS * tenant.weight
        return [task for tenant, task, tokens in chosen if tenant.deficit >= tokens]


def _offers(tenant: _Tenant, ready: Ready, urgency: Urgency, most: int) -> list[tuple[_User, Task]]:
    """The most urgent task of each user that is ready."""
    able: list[tuple[_User, Task]] = []
    for user in islice(tenant.users.values(), most):
        line = sorted(islice(user.line, SCAN_PER_USER), key=lambda task: -urgency(task))
        task = next((task for task in line if ready(task)), None)
        if task is not None:
            able.append((user, task))
    return able


def _turns(heads: list[tuple[_User, Task, int]]) -> list[tuple[Task, int]]:
    """Of one tenant's, those that fairness between its users lets go next, with their costs."""
    if not heads:
        return []
    rounds = min(_rounds(user.deficit, tokens, 1.0) for user, _, tokens in heads)
    for user, _, _ in heads:
        user.deficit += rounds * QUANTUM_TOKENS
    return [(task, tokens) for user, task, tokens in heads if user.deficit >= tokens]


def _rounds(deficit: float, tokens: int, weight: float) -> int:
    return max(0, math.ceil((tokens - deficit) / (QUANTUM_TOKENS * weight)))
