"""The RAM tier: blocks by key, deduplicated, accounted to the byte, evicted leaf first.

    divisible models      chains of blocks: a block is found by walking from the root, or from where the live cache ends;
                          where a prompt parts from a stored block midway, the block serves as far as they agree
    indivisible models    checkpoints: a whole state [0, p1) under the address of the block in which p1 ends, usable alone

Invariants: `bytes` is the sum of the entries' sizes and at most the budget, but for what is pinned; a pinned block stays; a
block goes only when nothing in RAM hangs from it; a short block that a longer sibling begins with is not kept beside it.

Knows nothing of engines, files or costs. Every public method takes the one lock for microseconds a block and does no I/O, so
any thread may call. Blocks leave as the immutable values they are; their payloads are freed outside the lock where possible.
"""

from __future__ import annotations

import threading
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from pasture.core.errors import InvariantBroken
from pasture.core.storage import BLOCK_TOKENS, BlockKey, TierStatistics
from pasture.core.values import Form
from pasture.tiers.block import Block
from pasture.tiers.entries import Entry, EvictionPolicy, LazyHeap, least_recently_used, size_of
from pasture.tiers.keys import Address
from pasture.tiers.trail import Trail, common_prefix

MAX_CANDIDATES = 32
"""siblings compared token by token, newest first"""
HIGH_WATER = 0.97
"""share of the budget above which `trim` evicts"""
LOW_WATER = 0.93
"""and down to which"""


@dataclass(frozen=True, slots=True)
class Unwritten:
    """A block that a slow tier does not have yet."""

    block: Block
    supersedes: tuple[BlockKey, ...]


class MemoryPin:
    """Holds entries of one tier; see `core.storage.Pin`."""

    def __init__(self, tier: MemoryTier, entries: list[Entry]) -> None:
        self._tier = tier
        self._entries = entries

    def release(self) -> None:
        entries, self._entries = self._entries, []
        self._tier.unpin(entries)


class MemoryTier:
    def __init__(
        self,
        budget_bytes: int,
        *,
        divisible: bool = True,
        policy: EvictionPolicy = least_recently_used,
        keep_unwritten: bool = False,
    ) -> None:
        """`keep_unwritten`: list new blocks for a writer to slow tiers."""
        self.divisible = divisible
        self.configured_bytes = budget_bytes
        self._budget_bytes = budget_bytes
        self._keep_unwritten = keep_unwritten
        self._lock = threading.Lock()
        self._entries: dict[BlockKey, Entry] = {}
        self._siblings: dict[tuple[BlockKey, int], dict[BlockKey, Entry]] = {}
        """(parent, first token) -> entries, oldest first"""
        self._n_children: Counter[BlockKey] = Counter()
        self._leaves: LazyHeap[Entry] = LazyHeap(policy, self._evictable)
        self._unwritten: dict[BlockKey, Entry] = {}
        """in the order in which they came, parents first"""
        self._tick = 0
        self._bytes = 0
        self._pinned_bytes = 0
        self._bytes_by_form: Counter[Form] = Counter()
        self._hit_tokens = 0
        self._missed_tokens = 0
        self._evicted_blocks = 0
        self._damaged_blocks = 0
        self._read_bytes = 0
        self._written_bytes = 0

    # Looking

    def reach(self, trail: Trail) -> int:
        """How many leading tokens are here, in a form that can be used."""
        with self._lock:
            path, p1 = self._path(trail)
            return p1 if path else 0

    def fetch(self, trail: Trail, p0: int, p1: int) -> tuple[Block, ...]:
        """The blocks that cover `[p0, p1)`, in order; empty when one is missing. A use of them and of all before them."""
        with self._lock:
            found = self._cover(trail, p0, p1)
            if found is None:
                self._missed_tokens += p1 - p0
                return ()
            self._touch(trail, found)
            self._hit_tokens += p1 - p0
            self._read_bytes += sum(entry.block.n_bytes for entry in found)
            return tuple(entry.block for entry in found)

    def missing(self, trail: Trail, p0: int, p1: int, *, use: bool = False) -> list[Address]:
        """The addresses in `[p0, p1)` that are not stored. With `use`, what is there counts as used."""
        with self._lock:
            if not self.divisible:
                last = trail[trail.n_blocks - 1]
                return [] if self._whole_at(trail, p1) is not None else [last]
            places = [(trail[index], self._stored(trail, index)) for index in trail.between(p0, p1)]
            if use:
                self._touch(trail, [entry for _, entry in places if entry is not None])
            return [address for address, entry in places if entry is None]

    def present(self, key: BlockKey) -> bool:
        with self._lock:
            return key in self._entries

    def count_missed(self, n_tokens: int) -> None:
        """Tokens that somebody wanted and RAM did not have."""
        with self._lock:
            self._missed_tokens += n_tokens

    # Storing

    def insert(self, block: Block, *, written: bool = False) -> bool:
        """Keep the block; evicts others where the budget needs it. False when there is no room beside what is pinned."""
        freed: list[Block] = []
        with self._lock:
            return self._insert(block, written, freed) is not None

    def insert_pinned(self, block: Block, *, written: bool) -> MemoryPin:
        """Keep the block whatever the budget says, until the pin is released."""
        freed: list[Block] = []
        with self._lock:
            entry = self._insert(block, written, freed, force=True)
            assert entry is not None, "a forced block is never refused"
            self._pin(entry)
            return MemoryPin(self, [entry])

    def replace(self, old: Block, new: Block, stage: int) -> bool:
        """Put another form of the same block in its place; False when `old` is not here any more."""
        with self._lock:
            entry = self._entries.get(old.address.key)
            if entry is None or entry.block is not old:
                return False
            self._account(entry, -1)
            entry.block = new
            entry.stage = stage
            self._account(entry, 1)
            return True

    def drop_damaged(self, block: Block) -> None:
        """Forget a block that turned out not to be what it claims, pinned or not."""
        with self._lock:
            entry = self._entries.get(block.address.key)
            if entry is not None:
                self._damaged_blocks += 1
                self._remove(entry)

    # Pins

    def pin(self, trail: Trail) -> MemoryPin:
        """Keep what `reach` counts."""
        with self._lock:
            path, _ = self._path(trail)
            for entry in path:
                self._pin(entry)
            return MemoryPin(self, path)

    def unpin(self, entries: Sequence[Entry]) -> None:
        with self._lock:
            for entry in entries:
                entry.pins -= 1
                if entry.pins or entry.gone:
                    continue
                self._pinned_bytes -= entry.size
                if entry.doomed:
                    self._remove(entry)
                else:
                    self._leaves.push(entry)

    # Room

    @property
    def budget_bytes(self) -> int:
        return self._budget_bytes

    @property
    def used_bytes(self) -> int:
        return self._bytes

    @property
    def pinned_bytes(self) -> int:
        return self._pinned_bytes

    def resize(self, budget_bytes: int) -> None:
        """Another budget; evicts at once what does not fit any more."""
        freed: list[Block] = []
        with self._lock:
            self._budget_bytes = budget_bytes
            self._evict_to(budget_bytes, freed)

    def trim(self) -> int:
        """Above the high watermark, evict down to the low one; returns the bytes freed. For a background thread."""
        freed: list[Block] = []
        with self._lock:
            if self._bytes > HIGH_WATER * self._budget_bytes:
                self._evict_to(int(LOW_WATER * self._budget_bytes), freed)
        return sum(map(size_of, freed))

    # For the writer

    def next_unwritten(self) -> Unwritten | None:
        """Take the oldest block that no slow tier has yet off the list."""
        with self._lock:
            for key, entry in self._unwritten.items():
                del self._unwritten[key]
                supersedes, entry.supersedes = tuple(entry.supersedes), []
                return Unwritten(entry.block, supersedes)
            return None

    @property
    def has_unwritten(self) -> bool:
        return bool(self._unwritten)

    # Pictures

    def statistics(
        self, *, in_flight_bytes: int = 0, errors: int = 0, latency_seconds: float = 0.0, bytes_per_second: float = 0.0
    ) -> TierStatistics:
        """Counters and sizes; what only the store knows comes as arguments."""
        with self._lock:
            return TierStatistics(
                name="ram",
                blocks=len(self._entries),
                bytes=self._bytes,
                budget_bytes=self._budget_bytes,
                pinned_bytes=self._pinned_bytes,
                in_flight_bytes=in_flight_bytes,
                bytes_by_form={form: n for form, n in self._bytes_by_form.items() if n},
                hit_tokens=self._hit_tokens,
                missed_tokens=self._missed_tokens,
                written_bytes=self._written_bytes,
                read_bytes=self._read_bytes,
                evicted_blocks=self._evicted_blocks,
                damaged_blocks=self._damaged_blocks,
                errors=errors,
                latency_seconds=latency_seconds,
                bytes_per_second=bytes_per_second,
            )

    def check(self) -> None:
        """Raises InvariantBroken where the books do not add up. O(blocks): for tests and idle time."""
        with self._lock:
            entries = self._entries.values()
            pinned = sum(entry.size for entry in entries if entry.pins)
            children = Counter(entry.block.address.parent for entry in entries)
            siblings = sum(map(len, self._siblings.values()))
            for claim, holds in (
                ("bytes", self._bytes == sum(entry.size for entry in entries)),
                ("bytes by form", self._bytes == sum(self._bytes_by_form.values())),
                ("pinned bytes", self._pinned_bytes == pinned),
                ("children", +self._n_children == children),
                ("siblings", siblings == len(self._entries)),
                ("budget", self._bytes <= self._budget_bytes or self._only_pinned_left()),
                ("unwritten", self._unwritten.keys() <= self._entries.keys()),
            ):
                if not holds:
                    raise InvariantBroken(f"RAM tier: {claim} do not add up")

    # Inside; the lock is held

    def _only_pinned_left(self) -> bool:
        return not any(self._evictable(entry) for entry in self._entries.values())

    def _path(self, trail: Trail) -> tuple[list[Entry], int]:
        """The usable entries of the trail, and how many leading tokens they give."""
        if not self.divisible:
            entry = self._longest_whole(trail)
            return ([entry], entry.block.address.p1) if entry is not None else ([], 0)
        path: list[Entry] = []
        for index in range(trail.n_blocks):
            entry = self._exact(trail, index)
            if entry is None:
                part = trail.part(index)
                best = self._best_sibling(trail[index].parent, part)
                if best is None:
                    return path, index * BLOCK_TOKENS
                return [*path, best], index * BLOCK_TOKENS + common_prefix(best.block.tokens, part)
            path.append(entry)
        return path, len(trail)

    def _cover(self, trail: Trail, p0: int, p1: int) -> list[Entry] | None:
        if not self.divisible:
            entry = self._whole_at(trail, p1) if p0 == 0 else None
            return [entry] if entry is not None else None
        found = []
        for index in trail.between(p0, p1):
            entry = self._exact(trail, index)
            if entry is None:
                part = trail.part(index)[: p1 - index * BLOCK_TOKENS]
                entry = self._best_sibling(trail[index].parent, part)
                if entry is None or common_prefix(entry.block.tokens, part) < len(part):
                    return None
            found.append(entry)
        return found

    def _exact(self, trail: Trail, index: int) -> Entry | None:
        entry = self._entries.get(trail[index].key)
        return entry if entry is not None and entry.block.tokens == trail.part(index) else None

    def _stored(self, trail: Trail, index: int) -> Entry | None:
        """The block itself, or for a short one a sibling that begins with it."""
        entry = self._exact(trail, index)
        part = trail.part(index)
        if entry is not None or len(part) == BLOCK_TOKENS:
            return entry
        best = self._best_sibling(trail[index].parent, part)
        return best if best is not None and common_prefix(best.block.tokens, part) == len(part) else None

    def _behind(self, parent: BlockKey, first_token: int) -> Iterator[Entry]:
        """A few entries behind `parent` that begin with this token, newest first."""
        siblings = self._siblings.get((parent, first_token))
        return islice(reversed(siblings.values()), MAX_CANDIDATES) if siblings else iter(())

    def _best_sibling(self, parent: BlockKey, part: array[int]) -> Entry | None:
        return max(self._behind(parent, part[0]), key=lambda e: common_prefix(e.block.tokens, part), default=None)

    def _whole_at(self, trail: Trail, p1: int) -> Entry | None:
        """The checkpoint of exactly `[0, p1)`."""
        index = (p1 - 1) // BLOCK_TOKENS
        part = trail.part(index)[: p1 - index * BLOCK_TOKENS]
        if p1 == trail[index].p1:
            return self._exact(trail, index)
        return next((entry for entry in self._behind(trail[index].parent, part[0]) if entry.block.tokens == part), None)

    def _longest_whole(self, trail: Trail) -> Entry | None:
        for index in reversed(range(trail.n_blocks)):
            entry = self._exact(trail, index)
            if entry is not None:
                return entry
            part = trail.part(index)
            fitting = (e for e in self._behind(trail[index].parent, part[0]) if e.block.tokens == part[: len(e.block.tokens)])
            best = max(fitting, key=lambda e: e.block.address.p1, default=None)
            if best is not None:
                return best
        return None

    def _touch(self, trail: Trail, entries: Sequence[Entry]) -> None:
        """A use of these neighbours, and of the path that leads to them."""
        self._tick += 1
        for entry in entries:
            entry.last_used = self._tick
            entry.uses += 1
        if self.divisible and entries:
            for index in range(entries[0].block.address.p0 // BLOCK_TOKENS):
                before = self._entries.get(trail[index].key)
                if before is not None:
                    before.last_used = self._tick
                    before.uses += 1

    def _insert(self, block: Block, written: bool, freed: list[Block], *, force: bool = False) -> Entry | None:
        address = block.address
        known = self._entries.get(address.key)
        if known is not None:
            return known
        entry = Entry(block)
        self._n_children[address.parent] += 1  # from here on the parent is no leaf, so it stays while room is made
        room = self._budget_bytes - entry.size
        if (entry.size > self._budget_bytes or not self._evict_to(room, freed)) and not force:
            self._n_children[address.parent] -= 1
            self._leaves_again(address.parent)
            return None
        self._supersede(entry)
        if self._n_children[address.parent] > 1:
            self._count_fork(address.parent)
        self._tick += 1
        entry.last_used = self._tick
        self._entries[address.key] = entry
        self._siblings.setdefault((address.parent, block.tokens[0]), {})[address.key] = entry
        self._account(entry, 1)
        self._written_bytes += block.n_bytes
        if self._keep_unwritten and not written:
            self._unwritten[address.key] = entry
        self._leaves.push(entry)
        return entry

    def _supersede(self, entry: Entry) -> None:
        """Shorter siblings that the new block begins with have nothing to add."""
        if entry.block.whole:
            return
        tokens = entry.block.tokens
        for other in list(self._behind(entry.block.address.parent, tokens[0])):
            shorter = other.block.tokens
            if len(shorter) < len(tokens) and tokens[: len(shorter)] == shorter:
                entry.supersedes += [*other.supersedes, other.block.address.key]
                if other.pins:
                    other.doomed = True
                else:
                    self._remove(other)

    def _count_fork(self, parent: BlockKey) -> None:
        above = self._entries.get(parent)
        while above is not None:
            above.forks += 1
            above = self._entries.get(above.block.address.parent)

    def _remove(self, entry: Entry) -> Block:
        block = entry.block
        del self._entries[block.address.key]
        name = (block.address.parent, block.tokens[0])
        siblings = self._siblings[name]
        del siblings[block.address.key]
        if not siblings:
            del self._siblings[name]
        self._unwritten.pop(block.address.key, None)
        self._account(entry, -1)
        self._n_children[block.address.parent] -= 1
        self._leaves_again(block.address.parent)
        return entry.empty()

    def _leaves_again(self, parent: BlockKey) -> None:
        """Something that hung from `parent` is gone: perhaps it is a leaf now."""
        if not self._n_children[parent]:
            del self._n_children[parent]
            entry = self._entries.get(parent)
            if entry is not None:
                self._leaves.push(entry)

    def _evictable(self, entry: Entry) -> bool:
        if entry.gone or entry.pins:
            return False
        return entry.block.whole or entry.block.address.key not in self._n_children

    def _evict_to(self, target_bytes: int, freed: list[Block]) -> bool:
        """Evict until at most `target_bytes` are used; False when only pinned blocks and their parents are left."""
        while self._bytes > target_bytes:
            victim = self._leaves.pop()
            if victim is None:
                return False
            freed.append(self._remove(victim))
            self._evicted_blocks += 1
        return True

    def _pin(self, entry: Entry) -> None:
        if not entry.pins:
            self._pinned_bytes += entry.size
        entry.pins += 1

    def _account(self, entry: Entry, sign: int) -> None:
        self._bytes += sign * entry.size
        self._bytes_by_form[entry.block.form] += sign * entry.size
        if entry.pins:
            self._pinned_bytes += sign * entry.size
