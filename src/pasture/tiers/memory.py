"""The RAM tier: blocks by key, deduplicated, accounted to the byte, evicted leaf first.

    divisible models      chains of blocks: a block is found by walking from the root, or from where the live cache ends;
                          where a prompt parts from a stored block midway, the block serves as far as they agree
    indivisible models    checkpoints: a whole state [0, p1) under the address of the block in which p1 ends, usable alone

Invariants: `used_bytes` is the sum of the entries' sizes, and at most the budget but for what is pinned; the same holds for an
owner's account and its limit; a pinned block stays; a block goes only when nothing in RAM hangs from it; a short block that a
longer sibling begins with is not kept beside it.

Knows nothing of engines, files or costs. Every public method takes the one lock for microseconds a block and does no I/O, so
any thread may call. Blocks leave as the immutable values they are; their payloads are freed outside the lock.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from pasture.core.errors import InvariantBroken
from pasture.core.storage import BLOCK_TOKENS, BlockKey, TierStatistics
from pasture.core.values import Allowance, Kind
from pasture.tiers.aheads import Aheads
from pasture.tiers.block import Block
from pasture.tiers.books import Books
from pasture.tiers.entries import Entry, LazyHeap, SortKey, size_of
from pasture.tiers.eviction import PolicyMaker, least_recently_used
from pasture.tiers.index import BlockIndex
from pasture.tiers.keys import Address
from pasture.tiers.owners import Owner, Owners
from pasture.tiers.room import Room
from pasture.tiers.trail import Trail
from pasture.tiers.unwritten import Lines, Unwritten

SHARED_FORKS = 3
"""paths that begin below a block from which on it counts as shared by many: a system prompt"""


class MemoryPin:
    """Holds entries of one tier; see `core.storage.Pin`."""

    def __init__(self, tier: MemoryTier, entries: list[Entry]) -> None:
        self._tier = tier
        self._entries = entries

    def release(self) -> None:
        entries, self._entries = self._entries, []
        self._tier.unpin(entries)


def coldest_first(entry: Entry) -> SortKey:
    """What is compressed first: nobody's, then the least compressed, then the least recently used."""
    return (bool(entry.pins) or entry.forks >= SHARED_FORKS, entry.stage, entry.last_used)


class MemoryTier:
    """See the module."""

    def __init__(
        self,
        budget_bytes: int,
        *,
        divisible: bool = True,
        policy: PolicyMaker = least_recently_used,
        n_writers: int = 0,
        squeeze_stages: int = 0,
    ) -> None:
        """`n_writers`: as many as there are slow tiers. `squeeze_stages`: steps of the compression ladder a block may take."""
        self.divisible = divisible
        self._squeeze_stages = squeeze_stages
        self._lock = threading.Lock()
        self._index = BlockIndex(divisible=divisible)
        self._owners = Owners(policy, self._evictable)
        self._squeezable: LazyHeap[Entry] = LazyHeap(coldest_first, self._can_be_squeezed)
        self._lines = Lines(n_writers)
        self._books = Books()
        self._room = Room(budget_bytes, self._books, self._owners, self._lines, self._remove)
        self._tick = 0
        self.aheads = Aheads()

    # What requests do, for the policy

    def arrived(self, trail: Trail) -> None:
        """A request with this prompt begins."""
        path = [trail[index].key for index in range(trail.n_blocks)]
        with self._lock:
            self._owners.arrived(trail.owner, path)

    def finished(self, trail: Trail, kind: Kind) -> None:
        """A request has ended with these tokens, its reply included, and `kind` is expected next."""
        path = [trail[index].key for index in range(trail.n_blocks)]
        with self._lock:
            self._owners.finished(trail.owner, path, kind)

    def allow(self, owner: BlockKey, allowance: Allowance) -> None:
        """The owner asks for something, under these terms; evicts at once what they do not allow any more."""
        freed: list[Block] = []
        with self._lock:
            self._owners.shares.allow(owner, allowance)
            self._room.keep_within(owner, 0, freed)

    def expected(self, trails: Sequence[Trail]) -> list[float]:
        """Uses a second that the policy expects of each one's last block; nothing of what is here already."""
        ends = [(trail.owner, trail[trail.n_blocks - 1].key) for trail in trails]
        with self._lock:
            return [0.0 if key in self._index else self._owners.expects(owner, key) for owner, key in ends]

    # Looking

    def reach(self, trail: Trail) -> int:
        """How many leading tokens are here, in a form that can be used."""
        with self._lock:
            return self._index.path(trail)[1]

    def fetch(self, trail: Trail, p0: int, p1: int) -> tuple[Block, ...]:
        """The blocks that cover `[p0, p1)`, in order; empty when one is missing. A use of them and of all before them."""
        with self._lock:
            found = self._index.cover(trail, p0, p1)
            if found is None:
                return ()
            self._touch(trail, found)
            self._owners.used(found)
            return tuple(entry.block for entry in found)

    def missing(self, trail: Trail, p0: int, p1: int, *, use: bool = False) -> list[Address]:
        """The addresses in `[p0, p1)` that are not stored. With `use`, what is there counts as used."""
        with self._lock:
            if self.divisible:
                places = [(trail[index], self._index.stored(trail, index)) for index in trail.between(p0, p1)]
            else:
                places = [(trail[trail.n_blocks - 1], self._index.whole_at(trail, p1))]
            if use:
                there = [entry for _, entry in places if entry is not None]
                self._touch(trail, there)
                self._owners.used(there)
            return [address for address, entry in places if entry is None]

    def __contains__(self, key: BlockKey) -> bool:
        with self._lock:
            return key in self._index

    def count(self, *, hit_tokens: int = 0, missed_tokens: int = 0, read_bytes: int = 0) -> None:
        """What came of looking, for the statistics."""
        with self._lock:
            self._books.hit_tokens += hit_tokens
            self._books.missed_tokens += missed_tokens
            self._books.read_bytes += read_bytes

    # Storing

    def insert(self, block: Block) -> bool:
        """Keep the block; evicts others where the budget needs it. False when what is here is pinned or worth more."""
        freed: list[Block] = []
        with self._lock:
            return self._insert(block, freed) is not None

    def insert_ahead(self, block: Block, *, source: int | None = None) -> bool:
        """Keep a block that nobody has asked for, at the cold end; False when everything here is worth as much."""
        freed: list[Block] = []
        with self._lock:
            return self._insert(block, freed, source=source, ahead=True) is not None

    def pass_by(self, block: Block) -> bool:
        """Show a block that is not kept here to the writers alone; False when there is none, or they have too much to do.

        Until they have taken it, it has room that blocks give up which every slow tier has.
        """
        freed: list[Block] = []
        with self._lock:
            if block.address.key in self._index:
                return len(self._lines) > 0
            if not self._room.make_way(size_of(block), freed):
                return False
            self._lines.pass_by(block)
            return True

    def insert_pinned(self, block: Block, *, source: int | None = None, ahead: bool = False) -> MemoryPin:
        """Keep the block whatever the budget says, until the pin is released. `source`: the writer that need not see it.

        `ahead`: nobody has asked for it yet.
        """
        freed: list[Block] = []
        with self._lock:
            entry = self._insert(block, freed, force=True, source=source, ahead=ahead)
            assert entry is not None, "a forced block is never refused"
            self._books.pin(entry)
            return MemoryPin(self, [entry])

    def drop_damaged(self, block: Block) -> None:
        """Forget a block that turned out not to be what it claims, pinned or not."""
        with self._lock:
            entry = self._index.get(block.address.key)
            if entry is not None:
                self._books.damaged_blocks += 1
                self._remove(entry)

    @property
    def tick(self) -> int:
        """Of the last use or arrival so far."""
        with self._lock:
            return self._tick

    def drop_unused(self, tick: int | None, own: Mapping[BlockKey, int | None]) -> int:
        """Drop what neither came nor was used since `tick`, unless it is pinned, unwritten, or something used hangs from it.

        `own`: the ticks of owners that have one of their own. None: all of it stays.
        """
        if tick is None and all(since is None for since in own.values()):
            return 0
        n_dropped = 0
        with self._lock:
            old = []
            for entry in self._index.values():
                since = tick if entry.owner is None else own.get(entry.owner, tick)
                if since is not None and max(entry.came, entry.last_used) <= since and not self._lines.lack(entry):
                    old.append(entry)
            for entry in sorted(old, key=lambda entry: -entry.block.address.p1):  # what hangs from others goes before them
                if self._evictable(entry):
                    self._remove(entry)
                    n_dropped += 1
            self._books.evicted_blocks += n_dropped
        return n_dropped

    # Pins

    def pinned_keys(self) -> list[BlockKey]:
        """The blocks that somebody holds."""
        with self._lock:
            return [entry.block.address.key for entry in self._index.values() if entry.pins]

    def pin(self, trail: Trail) -> MemoryPin:
        """Keep what `reach` counts."""
        with self._lock:
            path, _ = self._index.path(trail)
            for entry in path:
                self._books.pin(entry)
            return MemoryPin(self, path)

    def unpin(self, entries: Sequence[Entry]) -> None:
        """Let go; what only pins kept above the budget is evicted at once."""
        freed: list[Block] = []
        with self._lock:
            let_go = {entry.owner for entry in entries}
            for entry in entries:
                if not self._books.unpin(entry):
                    continue
                if entry.doomed:
                    freed.append(self._remove(entry))
                else:
                    self._owners.offered(entry)
                    self._offer_to_squeezer(entry)
            for owner in let_go:
                self._room.keep_within(owner, 0, freed)
            self._room.evict_to(self._room.budget_bytes, freed)

    # Room

    @property
    def budget_bytes(self) -> int:
        return self._room.budget_bytes

    @property
    def used_bytes(self) -> int:
        return self._books.bytes

    @property
    def pinned_bytes(self) -> int:
        return self._books.pinned_bytes

    @property
    def gone_bytes(self) -> int:
        """That have left from the beginning on, be it because a smaller form took their place."""
        return self._books.gone_bytes

    def resize(self, budget_bytes: int) -> None:
        """Another budget; evicts at once what does not fit any more."""
        freed: list[Block] = []
        with self._lock:
            self._room.budget_bytes = budget_bytes
            self._room.evict_to(budget_bytes, freed)

    def trim(self) -> int:
        """Above the high watermark, evict down to the low one; returns the bytes freed. For a background thread.

        Nothing goes that a slow tier still lacks: it only makes room before room is needed.
        """
        freed: list[Block] = []
        with self._lock:
            self._room.trim(freed)
        return sum(map(size_of, freed))

    # For the background: writing and squeezing

    def next_unwritten(self, writer: int = 0) -> Unwritten | None:
        """Take the oldest block that this writer's tier lacks off its line."""
        with self._lock:
            return self._lines.next(writer)

    def put_back(self, writer: int, item: Unwritten) -> None:
        """The tier did not take it: it stands aside until `offer_again`, if RAM still has it."""
        with self._lock:
            self._lines.put_back(writer, item, self._index.get(item.block.address.key))

    def offer_again(self, writer: int = 0) -> bool:
        """What this writer's tier did not take is next; False while there is something left of the last time."""
        with self._lock:
            return self._lines.offer_again(writer)

    def unwritten_blocks(self, writer: int = 0) -> int:
        return self._lines.length(writer)

    def next_to_squeeze(self) -> tuple[Block, int] | None:
        """The block that should be squeezed next and the stages it went through; its turn ends with `replace`."""
        with self._lock:
            entry = self._squeezable.pop()
            return (entry.block, entry.stage) if entry is not None else None

    def replace(self, old: Block, new: Block, stage: int) -> bool:
        """Put another form of the same block in its place; False when `old` is not here any more."""
        with self._lock:
            entry = self._index.get(old.address.key)
            if entry is None or entry.block is not old:
                return False
            before = entry.size
            self._books.leave(entry)
            entry.put(new)
            self._books.enter(entry)
            self._owners.account(entry.owner, entry.size - before)
            entry.stage = stage
            self._offer_to_squeezer(entry)
            return True

    # Pictures

    def statistics(
        self, *, in_flight_bytes: int = 0, errors: int = 0, latency_seconds: float = 0.0, bytes_per_second: float = 0.0
    ) -> TierStatistics:
        """Counters and sizes; what only the store knows comes as arguments."""
        with self._lock:
            return self._books.statistics(
                blocks=len(self._index),
                budget_bytes=self._room.budget_bytes,
                in_flight_bytes=in_flight_bytes + self._lines.passing_bytes,
                errors=errors,
                latency_seconds=latency_seconds,
                bytes_per_second=bytes_per_second,
            )

    def check(self) -> None:
        """Raises InvariantBroken where the books do not add up. O(blocks): for tests and idle time."""
        with self._lock:
            entries = self._index.values()
            claims = {
                **self._books.agree(entries),
                "owners' bytes": self._owners.bytes == _by_owner(entries),
                "links": self._index.check(),
                "budget": self._room.taken() <= self._room.budget_bytes or not any(map(self._evictable, entries)),
                "unwritten": self._lines.check({entry.block.address.key: entry for entry in entries}),
            }
            for claim, holds in claims.items():
                if not holds:
                    raise InvariantBroken(f"RAM tier: {claim} do not add up")

    # Inside; the lock is held

    def _touch(self, trail: Trail, entries: Sequence[Entry]) -> None:
        """A use of these neighbours, and of the path that leads to them."""
        self._tick += 1
        for entry in entries:
            entry.last_used = self._tick
        self.aheads.use(entry.block.address.key for entry in entries)
        if self.divisible and entries:
            for index in range(entries[0].block.address.p0 // BLOCK_TOKENS):
                before = self._index.get(trail[index].key)
                if before is not None:
                    before.last_used = self._tick
                    self.aheads.use((trail[index].key,))

    def _insert(
        self, block: Block, freed: list[Block], *, force: bool = False, source: int | None = None, ahead: bool = False
    ) -> Entry | None:
        parent = block.address.parent
        known = self._index.get(block.address.key)
        if known is not None:
            return known
        entry = Entry(block)
        self._index.gain_child(parent)  # from here on the parent is no leaf, so it stays while room is made
        room = self._room.high_water_bytes if ahead else self._room.budget_bytes  # so that no trim follows
        fits = self._room.keep_within(block.owner, entry.size, freed) and entry.size <= room
        fits = fits and self._room.evict_to(room - entry.size, freed, None if force else entry)
        if not fits and not force:
            self._leaf_again(self._index.lose_child(parent))
            return None
        self._supersede(entry)
        if self._index.n_children[parent] > 1:
            self._count_fork(parent)
        self._tick += 1
        entry.came = self._tick
        if ahead:
            self.aheads.issue(entry)  # its last use stays 0: the cold end of an order by use
        else:
            entry.last_used = self._tick
        self._index.add(entry)
        self._books.enter(entry)
        self._owners.entered(entry)
        self._books.written_bytes += block.n_bytes
        self._lines.entered(entry, source)
        self._owners.offered(entry)
        self._offer_to_squeezer(entry)
        return entry

    def _supersede(self, entry: Entry) -> None:
        """Shorter siblings that the new block begins with have nothing to add."""
        if entry.block.whole:
            return
        tokens = entry.block.tokens
        for other in list(self._index.behind(entry.block.address.parent, tokens[0])):
            shorter = other.block.tokens
            if len(shorter) < len(tokens) and tokens[: len(shorter)] == shorter:
                self._lines.supersede(entry.block.address.key, other.block.address.key)
                if other.pins:
                    other.doomed = True
                else:
                    self._remove(other)

    def _count_fork(self, parent: BlockKey) -> None:
        above = self._index.get(parent)
        while above is not None:
            above.forks += 1
            above = self._index.get(above.block.address.parent)

    def _remove(self, entry: Entry) -> Block:
        self._lines.left(entry)
        self.aheads.leave(entry.block.address.key)
        self._books.leave(entry)
        self._owners.removed(entry)
        self._leaf_again(self._index.remove(entry))
        return entry.empty()

    def _leaf_again(self, entry: Entry | None) -> None:
        if entry is not None:
            self._owners.offered(entry)

    def _evictable(self, entry: Entry) -> bool:
        return not (entry.gone or entry.pins) and self._index.is_leaf(entry)

    def _offer_to_squeezer(self, entry: Entry) -> None:
        if self._can_be_squeezed(entry):
            self._squeezable.push(entry)

    def _can_be_squeezed(self, entry: Entry) -> bool:
        return not entry.gone and entry.stage < self._squeeze_stages


def _by_owner(entries: Iterable[Entry]) -> dict[Owner, int]:
    held: Counter[Owner] = Counter()
    for entry in entries:
        held[entry.owner] += entry.size
    return dict(held)
