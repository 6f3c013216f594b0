"""Room in the RAM tier: how much of its budget is taken, and what goes when something needs more.

    evict_to      the least worth goes, whether slow tiers have it or not: something needs the room now
    trim          the same before room is needed, but nothing goes that a slow tier still lacks
    keep_within   what is on one owner's account goes, until the owner is within its limit
    make_way      for what is not kept here and only waits for the writers: written blocks alone give way

What goes before every slow tier has it passes by their writers, where there is room beside the budget. The policy says who is
next (`Owners`); whoever holds the room is told what to remove. The tier's lock is held around every call.
"""

from __future__ import annotations

from collections.abc import Callable

from pasture.tiers.block import Block
from pasture.tiers.books import Books
from pasture.tiers.entries import Entry
from pasture.tiers.owners import Owner, Owners
from pasture.tiers.unwritten import Lines

HIGH_WATER = 0.97
"""share of the budget above which `trim` evicts"""
LOW_WATER = 0.93
"""and down to which"""
PASSING_SHARE = 1 / 4
"""of the budget, at most, for what is not kept here and only waits for the writers"""
BESIDE_SHARE = 1 / 16
"""of the budget: so much of that does not count against it"""


class Room:
    def __init__(self, budget_bytes: int, books: Books, owners: Owners, lines: Lines, remove: Callable[[Entry], Block]) -> None:
        """`remove` takes an entry out of the tier and returns what it held, to be freed outside the lock."""
        self.budget_bytes = budget_bytes
        self._books = books
        self._owners = owners
        self._lines = lines
        self._remove = remove

    @property
    def high_water_bytes(self) -> int:
        return int(HIGH_WATER * self.budget_bytes)

    def taken(self, more_bytes: int = 0) -> int:
        """Of the budget; with `more_bytes` passing by."""
        passing = self._lines.passing_bytes + more_bytes
        if not passing:
            return self._books.bytes
        return self._books.bytes + max(0, passing - int(BESIDE_SHARE * self.budget_bytes))

    def evict_to(self, target_bytes: int, freed: list[Block], newcomer: Entry | None = None) -> bool:
        """Evict until at most `target_bytes` are taken; False when all that is left is pinned, needed or worth more."""
        while self.taken() > target_bytes:
            victim = self._owners.victim(self.budget_bytes, newcomer)
            if victim is None:
                return False
            if newcomer is not None and not self._owners.admits(newcomer, victim, self.budget_bytes):
                self._owners.offered(victim)
                return False
            self._pass_on(victim)
            self._evict(victim, freed)
        return True

    def trim(self, freed: list[Block]) -> None:
        """Above the high watermark, evict down to the low one, as far as slow tiers have what goes."""
        full = self.taken() > HIGH_WATER * self.budget_bytes
        while full and self.taken() > LOW_WATER * self.budget_bytes:
            victim = self._owners.victim(self.budget_bytes, None)
            if victim is None:
                return
            if not self._pass_on(victim):
                self._owners.offered(victim)
                return
            self._evict(victim, freed)

    def keep_within(self, owner: Owner, n_bytes: int, freed: list[Block]) -> bool:
        """Evict what is on the owner's account until `n_bytes` more are within its limit; False when the rest is pinned."""
        while self._owners.over(owner, n_bytes) > 0:
            victim = self._owners.victim_of(owner)
            if victim is None:
                return False
            self._evict(victim, freed)
        return True

    def make_way(self, n_bytes: int, freed: list[Block]) -> bool:
        """Evict what is written until so many bytes are free for what passes by; False when that cannot be."""
        if not len(self._lines) or n_bytes > PASSING_SHARE * self.budget_bytes - self._lines.passing_bytes:
            return False
        while self.taken(n_bytes) > self.budget_bytes:
            victim = self._owners.victim(self.budget_bytes, None)
            if victim is None:
                return False
            if self._lines.lack(victim):
                self._owners.offered(victim)
                return False
            self._evict(victim, freed)
        return True

    def _evict(self, victim: Entry, freed: list[Block]) -> None:
        freed.append(self._remove(victim))
        self._books.evicted_blocks += 1

    def _pass_on(self, entry: Entry) -> bool:
        """The writers that lack it may take it although it goes; False when one lacks it, and there is no room for that."""
        if not self._lines.lack(entry):
            return True
        fits = self._lines.passing_bytes + entry.size <= BESIDE_SHARE * self.budget_bytes
        if fits:
            self._lines.pass_on(entry)
        return fits
