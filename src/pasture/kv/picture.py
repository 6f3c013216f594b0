"""Draws the pool's statistics: one walk over the tree, one over the sequences. Reads, never writes."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pasture.core.statistics import NamespaceStatistics, PoolStatistics, SequenceStatistics
from pasture.core.values import Namespace

if TYPE_CHECKING:
    from pasture.kv.pool import Pool
    from pasture.kv.sequence import Sequence


def draw(pool: Pool) -> PoolStatistics:
    """What the pool holds now. O(nodes)."""
    cells: Counter[Namespace] = Counter()
    shared: Counter[Namespace] = Counter()
    saved = 0
    for namespace in pool.tree.namespaces():
        for node in pool.tree.nodes(namespace):
            copies = 1 if pool.cells_are_shared else len(node.holders)
            cells[namespace] += len(node) * copies
            if pool.cells_are_shared and len(node.holders) > 1:
                shared[namespace] += len(node)
                saved += len(node) * (len(node.holders) - 1)
    sequences = _sequences(pool)
    counts = Counter(sequence.namespace for sequence in sequences)
    used = pool.used_cells
    return PoolStatistics(
        shape=pool.shape,
        used_cells=used,
        running_cells=pool.locked_cells,
        idle_cells=used - pool.locked_cells,
        shared_cells=sum(shared.values()),
        saved_cells=saved,
        peak_cells=pool.peak_cells,
        fragmentation=pool.fragmentation,
        hit_tokens=dict(pool.hit_tokens),
        missed_tokens=pool.missed_tokens,
        evicted_cells=dict(pool.evicted_cells),
        compactions=pool.compactions,
        namespaces=tuple(
            NamespaceStatistics(name, cells[name], shared[name], counts[name], hit, missed)
            for name, (hit, missed) in pool.namespace_tokens.items()
        ),
        sequences=sequences,
    )


def _sequences(pool: Pool) -> tuple[SequenceStatistics, ...]:
    now = pool.clock()
    return tuple(
        SequenceStatistics(
            sequence=sequence.id,
            namespace=sequence.namespace,
            state=sequence.state,
            n_tokens=sequence.length,
            shared_tokens=_shared_tokens(sequence) if pool.cells_are_shared else 0,
            idle_seconds=max(0.0, now - sequence.tail.last_used) if sequence.idle else 0.0,
            request_id=sequence.request_id,
        )
        for sequence in sorted(pool.sequences.values(), key=lambda s: s.id)
    )


def _shared_tokens(sequence: Sequence) -> int:
    return sum(len(node) for node in sequence.tail.path() if len(node.holders) > 1)
