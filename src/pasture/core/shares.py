"""Who may hold how much of a budget, and below what nobody is pushed by others.

    |<----------------------- budget ----------------------->|
    | guaranteed: tenant a | b |  c  |  whoever uses it best  |

An owner has a share of its own where somebody gave it one; the others have, by weight, `BY_WEIGHT` of what is left over. Only
owners that asked for something lately have a guarantee: what an owner left behind protects nobody. A share that its owner does
not fill is lent. Every budget (live cells, RAM, disk) keeps one `Shares`, which knows its owners by whatever name is at hand
there. Knows no tenants and no bytes. Not thread-safe: it belongs to whoever keeps the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from pasture.core.ports import Clock
from pasture.core.values import Allowance

BY_WEIGHT = 0.5
"""of what is not given to somebody by name: so much is guaranteed, the other half goes to whoever uses it best"""
LATELY_SECONDS = 3600.0
"""an owner that has asked for nothing for so long has no guarantee"""
LOOK_SECONDS = 10.0
"""between two looks at who has not"""

O = TypeVar("O", bound=Hashable)  # noqa: E741  # an owner


@dataclass(frozen=True, slots=True)
class _Standing:
    allowance: Allowance
    asked_at: float


class Shares(Generic[O]):
    """See the module. `limit` picks an allowance's limit on this budget; `clock` in seconds."""

    def __init__(self, limit: Callable[[Allowance], int | None], clock: Clock) -> None:
        self._limit = limit
        self._clock = clock
        self._known: dict[O, _Standing] = {}
        self._fractions: Mapping[O, float] = {}
        self._look_at = clock()
        self.limited = False
        """whether anybody has a limit of their own"""

    def allow(self, owner: O, allowance: Allowance) -> None:
        """The owner asks for something, under these terms."""
        now, before = self._clock(), self._known.get(owner)
        self._known[owner] = _Standing(allowance, now)
        if before is None or before.allowance != allowance or now >= self._look_at:
            self._look(now)

    def knows(self, owner: O) -> bool:
        """Whether the owner has asked for something lately."""
        return owner in self._known

    def limit(self, owner: O) -> int | None:
        """What the owner may hold at most; None: no limit of its own."""
        known = self._known.get(owner)
        return self._limit(known.allowance) if known is not None else None

    def guaranteed(self, owner: O, budget: int) -> int:
        """Of `budget`, what nobody else may push the owner below. At most the budget, all owners together."""
        if self._clock() >= self._look_at:
            self._look(self._clock())
        return int(self._fractions.get(owner, 0.0) * budget)

    def beyond(self, held: Mapping[O, int], budget: int) -> list[O]:
        """Of those who hold something, the owners that hold more than they are guaranteed."""
        return [owner for owner, amount in held.items() if amount > self.guaranteed(owner, budget)]

    def _look(self, now: float) -> None:
        self._known = {owner: one for owner, one in self._known.items() if now - one.asked_at < LATELY_SECONDS}
        named = {owner: one.allowance.guaranteed_share for owner, one in self._known.items()}
        given = {owner: share for owner, share in named.items() if share is not None}
        total = sum(given.values())
        fractions = {owner: share / max(1.0, total) for owner, share in given.items()}
        others = {owner: one.allowance.weight for owner, one in self._known.items() if owner not in given}
        rest = BY_WEIGHT * max(0.0, 1.0 - total)
        fractions |= {owner: rest * weight / _sum(others.values()) for owner, weight in others.items()}
        self._fractions = fractions
        self._look_at = now + LOOK_SECONDS
        self.limited = any(self._limit(one.allowance) is not None for one in self._known.values())


def _sum(weights: Iterable[float]) -> float:
    return max(sum(weights), 1e-9)
