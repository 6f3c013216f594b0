"""The pool's conservation law, stated once and checked whole.

- Sequence ids are free or live, never both, and together they are all.
- A sequence ends where its tail ends; a node's holders are exactly the sequences whose path runs through it, and its running
  count is the number of those that run.
- An idle sequence holds something of its own (where cells are shared): otherwise its id would be wasted.
- Used cells are what the tree, or the lengths, add up to, and with those that compactions left at most `n_cells`; locked cells
  are those that somebody runs on.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pasture.core.errors import InvariantBroken
from pasture.kv.holdings import Holdings

if TYPE_CHECKING:
    from pasture.kv.pool import Pool


def check(pool: Pool) -> None:
    """Raises InvariantBroken with the first contradiction found. Changes nothing. O(nodes and sequences)."""
    pool.tree.check()
    _check_ids(pool)
    _check_holders(pool)
    _check_counts(pool)


def _check_ids(pool: Pool) -> None:
    ids = sorted([*pool.free_ids, *pool.sequences])
    if ids != list(range(pool.shape.n_seqs)):
        raise InvariantBroken(f"{pool.shape.n_seqs} sequence ids, but free and live ones are {ids}")


def _check_holders(pool: Pool) -> None:
    holders: Counter[int] = Counter()
    running: Counter[int] = Counter()
    for sequence in pool.sequences.values():
        if sequence.tail.end != sequence.length:
            raise InvariantBroken(f"{sequence!r} ends at {sequence.tail.end}")
        if sequence.idle and pool.cells_are_shared and len(sequence.tail.holders) != 1:
            raise InvariantBroken(f"{sequence!r} is idle and holds nothing of its own")
        for node in sequence.tail.path():
            holders[id(node)] += 1
            running[id(node)] += not sequence.idle
            if sequence not in node.holders:
                raise InvariantBroken(f"{sequence!r} runs through a node at {node.start} that does not know it")
    for node in pool.tree.nodes():
        if len(node.holders) != holders[id(node)] or node.running != running[id(node)]:
            raise InvariantBroken(f"the node at {node.start} counts {len(node.holders)} holders, {node.running} running")


def _check_counts(pool: Pool) -> None:
    lengths = sum(sequence.length for sequence in pool.sequences.values())
    used = pool.tree.n_tokens if pool.cells_are_shared else lengths
    if used != pool.used_cells:
        raise InvariantBroken(f"{used} cells are held, {pool.used_cells} counted as used")
    if used + pool.placement.left_cells > pool.shape.n_cells:
        raise InvariantBroken(f"{used} cells used and {pool.placement.left_cells} left of {pool.shape.n_cells}")
    counted, recount = pool.holdings, recounted(pool)
    if recount.locked_cells != counted.locked_cells:
        raise InvariantBroken(f"{recount.locked_cells} cells are locked, {counted.locked_cells} counted")
    if recount.held_by != counted.held_by or recount.locked_by != counted.locked_by:
        raise InvariantBroken(f"namespaces hold {dict(recount.held_by)}, {dict(counted.held_by)} counted")


def recounted(pool: Pool) -> Holdings:
    """What the holdings should be. O(nodes and sequences)."""
    holdings = Holdings()
    if not pool.cells_are_shared:
        for sequence in pool.sequences.values():
            holdings.hold(sequence.namespace, sequence.length)
            holdings.lock(sequence.namespace, 0 if sequence.idle else sequence.length)
        return holdings
    for namespace in pool.tree.namespaces():
        for node in pool.tree.nodes(namespace):
            holdings.hold(namespace, len(node))
            holdings.lock(namespace, len(node) if node.running else 0)
    return holdings
