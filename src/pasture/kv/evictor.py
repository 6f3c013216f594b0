"""Makes room in the live cache: who gives up idle cells, or an idle sequence's id, for whom.

    a namespace with a limit of its own     gives up its own idle leaves first, and never takes more than its limit
    everybody                               idle leaves in the policy's order, those of guaranteed holdings last

What is guaranteed is a preference here, not a lock: who runs comes first, and what leaves is saved. Admission sees to it that
nobody starts at the cost of what others are guaranteed (`guaranteed_to_others`). Owns the shares; the pool owns the cells and
does the evicting. Engine thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pasture.core.shares import Shares
from pasture.core.values import Allowance, Layout, Namespace
from pasture.kv.eviction import Policy, guaranteed_last
from pasture.kv.lookup import candidate
from pasture.kv.sequence import Sequence

if TYPE_CHECKING:
    from pasture.kv.pool import Pool

TRIM_TOKENS = 64
"""an idle leaf is trimmed from its end by at least this much, so that eviction is not one operation a token"""


class Evictor:
    def __init__(self, pool: Pool, policy: Policy) -> None:
        self.shares: Shares[Namespace] = Shares(_live_cells, pool.clock)
        self._pool = pool
        self._order = guaranteed_last(policy)

    def make_room(self, n_cells: int) -> bool:
        """Make `n_cells` cells free; False when running sequences hold too many."""
        pool = self._pool
        if pool.shape.layout is Layout.STREAMS:
            return True  # a stream's cells are its own; admission sees to it that they suffice
        if n_cells > pool.free_cells:
            pool.placement.release()
        while (missing := n_cells - pool.free_cells) > 0:
            victim = self.victim()
            if victim is None:
                return False
            self._shrink(victim, missing)
        return True

    def keep_within(self, namespace: Namespace, n_cells: int) -> bool:
        """Have the namespace give up idle cells until `n_cells` more are within its limit; False when it runs on too many."""
        limit = self.shares.limit(namespace)
        if limit is None:
            return True
        held = self._pool.holdings.held_by
        while (missing := held.get(namespace, 0) + n_cells - limit) > 0:
            victim = self.victim(namespace)
            if victim is None:
                return False
            self._shrink(victim, missing)
        return True

    def room_for(self, namespace: Namespace) -> int:
        """Cells more that the namespace could come to run on, if everything idle that may go went."""
        limit, unlocked = self.shares.limit(namespace), self._pool.unlocked_cells
        return unlocked if limit is None else min(unlocked, limit - self._pool.holdings.locked_by.get(namespace, 0))

    def guaranteed_to_others(self, namespace: Namespace) -> int:
        """Idle cells of other namespaces that these are guaranteed."""
        holdings, n_cells = self._pool.holdings, self._pool.shape.n_cells
        total = 0
        for name, held in holdings.held_by.items():
            if name != namespace:
                guaranteed = min(held, self.shares.guaranteed(name, n_cells))
                total += max(0, guaranteed - holdings.locked_by.get(name, 0))
        return total

    def victim(self, namespace: Namespace | None = None, *, keep: Sequence | None = None) -> Sequence | None:
        """The idle sequence (of one namespace, or of all) that goes first."""
        idle = [s for s in self._pool.sequences.values() if s.idle and s is not keep and namespace in (None, s.namespace)]
        return self.first(idle)

    def first(self, idle: list[Sequence]) -> Sequence | None:
        """Of these idle sequences, the one that goes first."""
        held, n_cells = self._pool.holdings.held_by, self._pool.shape.n_cells
        safe = {name: held.get(name, 0) <= self.shares.guaranteed(name, n_cells) for name in {s.namespace for s in idle}}
        return min(idle, key=lambda s: self._order(candidate(s, guaranteed=safe[s.namespace])), default=None)

    def _shrink(self, victim: Sequence, n_cells: int) -> None:
        """Give back `n_cells` or a few more of an idle sequence's own cells; fewer where it has fewer, or others are spare."""
        pool, leaf = self._pool, victim.tail
        spare = pool.holdings.held_by[victim.namespace] - self.shares.guaranteed(victim.namespace, pool.shape.n_cells)
        n = max(n_cells, TRIM_TOKENS) if spare <= 0 else min(spare, max(n_cells, TRIM_TOKENS))
        parent = leaf.parent
        assert parent is not None
        if pool.cells_are_shared and n < len(leaf):
            pool.cut_back(victim, pool.tree.split(leaf, len(leaf) - n), "cells")
        elif pool.cells_are_shared and parent.parent is not None and len(parent.holders) == 1:
            pool.cut_back(victim, parent, "cells")
        else:
            pool.drop(victim, "cells")


def _live_cells(allowance: Allowance) -> int | None:
    return allowance.live_cells
