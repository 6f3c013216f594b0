"""The shared pool: which tokens are in the live cache, who holds them, and who goes when room is needed.

Owns the radix tree of live cells and the engine's sequence ids. Never touches the engine: every change of cells is written into
a journal of operations, which the scheduler hands to the engine in the order in which the pool decided them. Runs without a
model.

Two ways to count cells, one tree for both:

    shared   (unified layout)            a node's cells exist once, whoever holds it:   used = tokens in the tree
    private  (streams layout, sharing    every holder has a copy of its own:            used = sum of the sequences' lengths
              off, or a recurrent model)

Conservation law (`check`): sequence ids are free or live, never both; a node's holders are exactly the sequences whose path
runs through it; used cells are what the tree (or the lengths) add up to, and with what compactions left at most `n_cells`;
running counts are explained.

Thread: the engine's. Sources: RadixAttention (SGLang) for the tree, vLLM's KVCacheManager for "does not fit is None".
"""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from collections.abc import Callable, Iterable

from pasture.core.ports import Clock
from pasture.core.statistics import PoolStatistics, SequenceState
from pasture.core.values import (
    CellOperation,
    Copy,
    Layout,
    Namespace,
    PoolShape,
    Remove,
    RequestId,
    Restore,
    Save,
    Segment,
    SeqId,
    Share,
    Slab,
)
from pasture.kv.eviction import Policy, least_recently_used
from pasture.kv.evictor import Evictor
from pasture.kv.holdings import Holdings
from pasture.kv.law import check, recounted
from pasture.kv.lookup import holders_state, idle_sequence_at, reusable, unlocked_tokens
from pasture.kv.picture import draw
from pasture.kv.placement import Placement
from pasture.kv.radix import Match, Node, RadixTree, common_prefix
from pasture.kv.sequence import Sequence


class Pool:
    def __init__(
        self,
        shape: PoolShape,
        *,
        clock: Clock,
        share: bool = True,
        shareable: bool = True,
        policy: Policy = least_recently_used,
    ) -> None:
        self.compactions = 0
        self.hit_tokens: Counter[str] = Counter()
        self.missed_tokens = 0
        self.namespace_tokens: dict[Namespace, list[int]] = {}
        """namespace -> [hit, missed]"""
        self.evicted_cells: Counter[str] = Counter()
        self.peak_cells = 0
        self._share = share
        self._shareable = shareable
        self._clock = clock
        self.evictor = Evictor(self, policy)
        self._save_keys = 0
        self.before_eviction: Callable[[Sequence], object] = lambda sequence: None
        """called while an idle sequence that is about to lose cells still has them all: the moment to `save`"""
        self.reset(shape)

    def reset(self, shape: PoolShape) -> None:
        """Forget every sequence, as the engine has. Counters go on."""
        self.shape = shape
        self.tree: RadixTree[Sequence] = RadixTree()
        self.sequences: dict[SeqId, Sequence] = {}
        self.holdings = Holdings()
        self._private_cells = 0
        self._journal: list[CellOperation] = []
        self.free_ids = [SeqId(i) for i in range(shape.n_seqs)]
        self.placement = Placement(lambda operation: self._journal.append(operation))

    # What is there

    @property
    def clock(self) -> Clock:
        return self._clock

    @property
    def cells_are_shared(self) -> bool:
        """Whether a cell can belong to several sequences at once."""
        return self._share and self._shareable and self.shape.layout is Layout.UNIFIED

    @property
    def shares(self) -> bool:
        """Whether what one request computed may serve another."""
        return self._share

    @property
    def cuttable(self) -> bool:
        """Whether a part of a sequence can be removed or joined (not so for recurrent models)."""
        return self._shareable

    @property
    def joins(self) -> bool:
        """Whether a prompt may start from the middle of another sequence."""
        return self._share and self._shareable

    @property
    def used_cells(self) -> int:
        return self.tree.n_tokens if self.cells_are_shared else self._private_cells

    @property
    def free_cells(self) -> int:
        return self.shape.n_cells - self.used_cells - self.placement.left_cells

    @property
    def locked_cells(self) -> int:
        """Cells that a running sequence holds: what eviction cannot give back."""
        return self.holdings.locked_cells

    @property
    def unlocked_cells(self) -> int:
        """Cells that are free or could be freed without touching a running sequence."""
        return self.shape.n_cells - self.locked_cells

    @property
    def fragmentation(self) -> float:
        """0..1: neighbouring tokens that are not neighbours in the cache, as a share of all tokens. O(nodes)."""
        return sum(len(node.breaks) for node in self.tree.nodes()) / max(1, self.tree.n_tokens)

    @property
    def has_sequence_to_give(self) -> bool:
        return bool(self.free_ids) or any(sequence.idle for sequence in self.sequences.values())

    def lookup(self, namespace: Namespace, prompt: array[int]) -> int:
        """How many tokens of the prompt a `join` would find: at most all but the last, whose logits are needed."""
        match = self._reusable(namespace, prompt)
        return match.length

    def cells_to_lock(self, namespace: Namespace, prompt: array[int]) -> int:
        """How many unlocked cells a `join` would need for itself: its prefix where that is idle, and its rest."""
        match = self._reusable(namespace, prompt)
        if not self.cells_are_shared:
            return len(prompt)
        return len(prompt) - match.length + unlocked_tokens(match)

    def distinct_cells(self, sequences: Iterable[Sequence]) -> int:
        """Cells that these sequences hold, each counted once. O(nodes on their paths)."""
        seen: set[int] = set()
        cells = 0
        for sequence in sequences:
            for node in sequence.tail.path():
                if id(node) in seen:
                    break
                seen.add(id(node))
                cells += len(node)
        return cells

    # Coming

    def join(self, namespace: Namespace, prompt: array[int], request_id: RequestId) -> Sequence | None:
        """A running sequence that starts with the longest prefix found; None when every sequence id runs.

        An idle sequence that the prompt continues is taken over; anything else is joined and keeps all it had. May split tree
        nodes, and may evict an idle sequence for its id.
        """
        match = self._reusable(namespace, prompt)
        node = self.tree.cut(match)
        found = idle_sequence_at(node)
        source = "idle"
        if found is None:
            if match.length:
                source = holders_state(node)
            found = self._enter(namespace, node, match.length, request_id) or self._cut_down(node, request_id)
            if found is None:
                return None
        else:
            self._take_over(found, request_id)
        self._touch(found)
        for step in node.path():
            step.hits += 1
        self._count(namespace, source, match.length, len(prompt) - match.length)
        return found

    def begin(self, namespace: Namespace, request_id: RequestId) -> Sequence | None:
        """A running sequence of nothing, for a state that can only be restored whole; None when every sequence id runs."""
        sequence = self._enter(namespace, self.tree.root(namespace), 0, request_id)
        if sequence is not None:
            self._touch(sequence)
        return sequence

    def restore(self, sequence: Sequence, tokens: array[int], slabs: tuple[Slab, ...]) -> bool:
        """Put stored KV of `tokens` behind what a running sequence has; False, and it is not there, when there is no room."""
        if not self.evictor.keep_within(sequence.namespace, len(tokens)) or not self.make_room(len(tokens)):
            return False
        self._journal.append(Restore(sequence.id, slabs))
        self.placement.wrote(None)
        self._append(sequence, tokens)
        self._count(sequence.namespace, "stored", len(tokens), -len(tokens))
        return True

    # Growing

    def extend(self, sequence: Sequence, tokens: array[int]) -> None:
        """The engine has computed `tokens` at `[length, length + n)` of the sequence.

        Where another sequence has the same tokens behind the same prefix, the copy is given back and the sequence joins that
        one's cells: the tree never holds a token twice.
        """
        self._append(sequence, tokens, rejoin=self.cells_are_shared)
        sequence.tail.last_used = self._clock()

    def make_room(self, n_cells: int) -> bool:
        """Make `n_cells` cells free by evicting idle leaves; False when running sequences hold too many."""
        return self.evictor.make_room(n_cells)

    def evict_idle(self, reason: str) -> None:
        """Drop every idle sequence."""
        for sequence in [s for s in self.sequences.values() if s.idle]:
            self.drop(sequence, reason)

    # Going

    def finish(self, sequence: Sequence) -> None:
        """The request is over; its tokens stay as an idle sequence until their room is needed."""
        self._touch(sequence)
        self._rest(sequence)
        sequence.state = SequenceState.IDLE
        sequence.request_id = None
        if sequence.length == 0 or (self.cells_are_shared and len(sequence.tail.holders) > 1):
            self.drop(sequence)
        elif self.cells_are_shared and self.shape.can_pad:  # there are tiles, and all of a sequence shows
            self.placement.gather(sequence, self.free_cells, self.used_cells)

    def drop(self, sequence: Sequence, reason: str | None = None, *, emptied: bool = False, unsaved: bool = False) -> None:
        """Forget a sequence; cells that nobody else holds become free. With a reason it counts as an eviction.

        `emptied`: the engine has let go of its cells already. `unsaved`: nobody is to keep what was in them.
        """
        if reason is not None and sequence.idle and sequence.length and not emptied and not unsaved:
            self.before_eviction(sequence)
        before = self.used_cells
        if not sequence.idle:
            self._rest(sequence)
        if sequence.length and not emptied:
            self._journal.append(Remove(sequence.id, 0, None))
        self.tree.leave(sequence.tail, sequence)
        self.placement.gone(sequence, before - self.used_cells)
        self._private_cells -= sequence.length
        del self.sequences[sequence.id]
        heapq.heappush(self.free_ids, sequence.id)
        self.holdings.hold(sequence.namespace, self.used_cells - before)
        if reason is not None:
            self.evicted_cells[reason] += before - self.used_cells

    def save(self, sequence: Sequence, p0: int, p1: int | None = None) -> int:
        """Copy what the sequence has in `[p0, p1)` out of the cache; `p1=None`: to its end.

        Returns the key under which the result holds the slab.
        """
        self._save_keys += 1
        self._journal.append(Save(sequence.id, p0, sequence.length if p1 is None else p1, self._save_keys))
        return self._save_keys

    def lose(self, sequence: Sequence) -> None:
        """The engine emptied the sequence (a recurrent state that could not be cut back): forget it."""
        self.drop(sequence, "failure", emptied=True)

    # Operations and rebuilding

    def operations(self) -> tuple[CellOperation, ...]:
        """What the engine has to carry out, in order, before it computes anything. Empties the journal."""
        journal, self._journal = tuple(self._journal), []
        return journal

    @property
    def has_operations(self) -> bool:
        return bool(self._journal)

    def segments(self) -> tuple[Segment, ...]:
        """Every node of the tree as cells and holders, parents before children: what a rebuild has to keep."""
        return tuple(
            Segment(tuple(sorted(holder.id for holder in node.holders)), node.start, node.end) for node in self._depth_first()
        )

    def rebuilt(self, shape: PoolShape) -> None:
        """The engine has laid the cache out anew from `segments`: contiguous, perhaps in another layout."""
        assert not self._journal, "a rebuild must not overtake operations"
        self.shape = shape
        self.compactions += 1
        self.free_ids = [SeqId(i) for i in range(shape.n_seqs) if SeqId(i) not in self.sequences]
        for node in self.tree.nodes():
            node.breaks.clear()
        self.placement.laid_out_anew()
        if self.cells_are_shared:
            for sequence in [s for s in self.sequences.values() if s.idle]:
                if len(sequence.tail.holders) > 1:  # the last of several that are equal stays
                    self.drop(sequence)
        self._recount()

    def make_movable(self, layout: Layout, n_seqs: int, cells_per_sequence: int) -> bool:
        """Drop the idle sequences that a move to `layout` could not take along; False when a running one is in the way."""
        in_the_way = [s for s in self.sequences.values() if s.id >= n_seqs or s.length > cells_per_sequence]
        if any(not sequence.idle for sequence in in_the_way):
            return False
        for sequence in in_the_way:
            self.drop(sequence, "layout")
        return layout is Layout.STREAMS or self.tree.n_tokens <= self.shape.n_cells

    # Checks and pictures

    def check(self) -> None:
        """Raises InvariantBroken when the conservation law does not hold. O(nodes and sequences)."""
        check(self)

    def statistics(self) -> PoolStatistics:
        return draw(self)

    # Inside

    def _reusable(self, namespace: Namespace, prompt: array[int]) -> Match[Sequence]:
        return reusable(self.tree, namespace, prompt, joins=self.joins)

    def _enter(self, namespace: Namespace, node: Node[Sequence], length: int, request_id: RequestId) -> Sequence | None:
        donor = min(node.holders, key=lambda s: (s.idle, s.id), default=None)
        seq_id = self._take_id(keep=donor)
        if seq_id is None:
            return None
        if node.parent is None:
            node = self.tree.root(namespace)
        sequence = Sequence(seq_id, namespace, node, request_id)
        sequence.length = length
        self.sequences[seq_id] = sequence
        self._private_cells += length
        if not self.cells_are_shared:
            self.holdings.hold(namespace, length)
        if donor is not None and length:
            self._journal.append(Copy(donor.id, seq_id, 0, length))
        self.tree.hold(node, sequence)
        self._run(sequence)
        return sequence

    def _take_over(self, sequence: Sequence, request_id: RequestId) -> None:
        sequence.state = SequenceState.PREFILLING
        sequence.request_id = request_id
        self._run(sequence)

    def _cut_down(self, node: Node[Sequence], request_id: RequestId) -> Sequence | None:
        """No id is left but those of idle sequences that run on beyond `node`: one of them gives its tail and goes on."""
        sequence = self.evictor.first([sequence for sequence in node.holders if sequence.idle]) if self.cuttable else None
        if sequence is None:
            return None
        self.cut_back(sequence, node, "sequences")
        self._take_over(sequence, request_id)
        return sequence

    def cut_back(self, sequence: Sequence, node: Node[Sequence], reason: str) -> None:
        """The idle sequence leaves everything below `node`, which is on its path."""
        self.before_eviction(sequence)
        before = self.used_cells
        self.tree.leave(sequence.tail, sequence, down_to=node)
        self._private_cells -= sequence.length - node.end
        sequence.tail, sequence.length = node, node.end
        self._journal.append(Remove(sequence.id, node.end, None))
        self.placement.gone(sequence, before - self.used_cells)
        self.holdings.hold(sequence.namespace, self.used_cells - before)
        self.evicted_cells[reason] += before - self.used_cells

    def _take_id(self, keep: Sequence | None) -> SeqId | None:
        if not self.free_ids:
            victim = self.evictor.victim(keep=keep)
            if victim is None:
                return None
            self.drop(victim, "sequences")
        return heapq.heappop(self.free_ids)

    def _append(self, sequence: Sequence, tokens: array[int], rejoin: bool = False) -> None:
        node, at, n = sequence.tail, 0, len(tokens)
        start = sequence.length
        broken = not self.placement.continues(sequence) and self.shape.layout is Layout.UNIFIED
        while at < n:
            child = node.children.get(tokens[at])
            if child is None:
                grown = self.tree.grow(node, tokens[at:] if at else tokens, sequence)
                if broken and start:
                    grown.breaks.append(start + at)
                if grown is not node:
                    grown.running = 1
                if self.cells_are_shared:
                    self._grew(sequence, n - at)
                node = grown
                break
            node = self._pass_through(sequence, child, tokens, at, rejoin)
            at += len(node)
        sequence.tail = node
        sequence.length += n
        self._private_cells += n
        if not self.cells_are_shared:
            self._grew(sequence, n)
        self.placement.wrote(sequence)
        self.peak_cells = max(self.peak_cells, self.used_cells)

    def _grew(self, sequence: Sequence, n_cells: int) -> None:
        self.holdings.hold(sequence.namespace, n_cells)
        self.holdings.lock(sequence.namespace, n_cells)

    def _pass_through(
        self, sequence: Sequence, child: Node[Sequence], tokens: array[int], at: int, rejoin: bool
    ) -> Node[Sequence]:
        """The tokens from `at` on are in the tree already: walk into `child`, splitting it where they part."""
        match = common_prefix(child.tokens, 0, tokens, at)
        node = child if match == len(child) else self.tree.split(child, match)
        if rejoin:
            donor = next(iter(node.holders))
            self._journal.append(Share(donor.id, sequence.id, node.start, node.end))
        node.holders.add(sequence)
        self._gain_runner(node, sequence.namespace)
        node.last_used = self._clock()
        redundant = idle_sequence_at(node) if self.cells_are_shared else None
        if redundant is not None:
            self.drop(redundant)
        return node

    def _gain_runner(self, node: Node[Sequence], namespace: Namespace) -> None:
        node.running += 1
        if node.running == 1 and self.cells_are_shared:
            self.holdings.lock(namespace, len(node))

    def _run(self, sequence: Sequence) -> None:
        for node in sequence.tail.path():
            self._gain_runner(node, sequence.namespace)
        if not self.cells_are_shared:
            self.holdings.lock(sequence.namespace, sequence.length)
            return
        # an idle sequence that ended where this one now runs through holds nothing of its own any more
        for node in sequence.tail.path():
            redundant = idle_sequence_at(node)
            if redundant is not None and redundant is not sequence:
                self.drop(redundant)

    def _rest(self, sequence: Sequence) -> None:
        for node in sequence.tail.path():
            node.running -= 1
            if node.running == 0 and self.cells_are_shared:
                self.holdings.lock(sequence.namespace, -len(node))
        if not self.cells_are_shared:
            self.holdings.lock(sequence.namespace, -sequence.length)

    def _touch(self, sequence: Sequence) -> None:
        now = self._clock()
        for node in sequence.tail.path():
            node.last_used = now

    def _count(self, namespace: Namespace, source: str, hit: int, missed: int) -> None:
        if hit:
            self.hit_tokens[source] += hit
        self.missed_tokens += missed
        counts = self.namespace_tokens.setdefault(namespace, [0, 0])
        counts[0] += hit
        counts[1] += missed

    def _recount(self) -> None:
        self._private_cells = sum(sequence.length for sequence in self.sequences.values())
        self.holdings = recounted(self)

    def _depth_first(self) -> Iterable[Node[Sequence]]:
        """Along each path to its end before the next: neighbours in a sequence become neighbours in the cache."""
        return self.tree.nodes()
