"""Which idle cells go first: a policy is a function from a candidate to a sort key, smallest evicted first.

Only leaves are candidates, so whatever the policy, the head of a shared prefix outlives its tails; and what its tenant is
guaranteed goes after everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pasture.core.values import Namespace


@dataclass(frozen=True, slots=True)
class Candidate:
    """An idle leaf: cells that no running request needs and that nothing hangs below."""

    namespace: Namespace
    start: int
    """position of the leaf's first token: what is recomputed later attends to this many tokens"""
    n_tokens: int
    last_used: float
    """seconds on the pool's clock"""
    guaranteed: bool = False
    """its namespace holds no more than nobody may push it below"""


Policy = Callable[[Candidate], float]


def least_recently_used(candidate: Candidate) -> float:
    return candidate.last_used


def largest_first(candidate: Candidate) -> float:
    """Frees room with the fewest evictions; forgets long documents first."""
    return -candidate.n_tokens


def guaranteed_last(policy: Policy) -> Callable[[Candidate], tuple[bool, float]]:
    """The same order, but for what is guaranteed."""
    return lambda candidate: (candidate.guaranteed, policy(candidate))


POLICIES: dict[str, Policy] = {"lru": least_recently_used, "largest": largest_first}
