"""Draws the pool's statistics: two walks over the tree, one over the sequences. Reads, never writes."""

from __future__ import annotations

import heapq
from collections import Counter
from typing import TYPE_CHECKING

from pasture.core.statistics import (
    MAX_PREFIXES,
    NamespaceStatistics,
    PoolStatistics,
    PrefixStatistics,
    SequenceStatistics,
)
from pasture.core.values import Namespace

if TYPE_CHECKING:
    from pasture.kv.pool import Pool
    from pasture.kv.radix import Node
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
        prefixes=_prefixes(pool),
    )


def _prefixes(pool: Pool) -> tuple[PrefixStatistics, ...]:
    """The part of the tree that weighs most (tokens by holders), never a node without its parent. O(nodes log nodes)."""
    now = pool.clock()
    drawn: list[PrefixStatistics] = []
    heap: list[tuple[int, int, Namespace, Node[Sequence]]] = []
    for namespace in pool.tree.namespaces():
        _push(heap, namespace, pool.tree.root(namespace))
    while heap and len(drawn) < MAX_PREFIXES:
        _, _, namespace, node = heapq.heappop(heap)
        drawn.append(_prefix(namespace, node, now))
        _push(heap, namespace, node)
    return tuple(drawn)


def _push(heap: list[tuple[int, int, Namespace, Node[Sequence]]], namespace: Namespace, parent: Node[Sequence]) -> None:
    for child in parent.children.values():
        heapq.heappush(heap, (-len(child) * len(child.holders), child.number, namespace, child))


def _prefix(namespace: Namespace, node: Node[Sequence], now: float) -> PrefixStatistics:
    parent = node.parent
    return PrefixStatistics(
        number=node.number,
        parent=None if parent is None or parent.parent is None else parent.number,
        namespace=namespace,
        start=node.start,
        n_tokens=len(node),
        holders=len(node.holders),
        running=node.running,
        idle_seconds=0.0 if node.running else max(0.0, now - node.last_used),
        hits=node.hits,
        tokens=node.tokens[:],
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
            prefix=sequence.tail.number if sequence.length else None,
        )
        for sequence in sorted(pool.sequences.values(), key=lambda s: s.id)
    )


def _shared_tokens(sequence: Sequence) -> int:
    return sum(len(node) for node in sequence.tail.path() if len(node.holders) > 1)
