"""S3-FIFO, leaf first: a small queue that new blocks pass, a large one for what was used again, and a memory of who left early.

A block enters the small queue, or the large one if it left the small one lately without having been used. While the small
queue holds more than its share of the bytes, its oldest leaf goes: into the large queue if it was used since it came, else out.
The large queue gives every use, up to three, another round. Blocks that something hangs from are passed over: they are offered
again as leaves. Owned by one tier, under its lock. Source: Yang et al., "FIFO queues are all you need for cache eviction",
SOSP 2023.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

from pasture.core.storage import BlockKey
from pasture.core.values import Kind
from pasture.tiers.entries import Entry
from pasture.tiers.eviction import Wanted

SMALL_SHARE = 0.1
MAX_USES = 3
FIRST_SWEEP = 1024
"""entries in the queues, at least, before those that have left are looked for"""


class _Standing:
    __slots__ = ("in_small", "queued", "size", "uses")

    def __init__(self, size: int, *, in_small: bool) -> None:
        self.size = size
        """as counted: an entry that is squeezed meanwhile leaves with what it came with"""
        self.in_small = in_small
        self.queued = False
        self.uses = 0


class S3Fifo:
    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._standing: dict[BlockKey, _Standing] = {}
        self._small: deque[Entry] = deque()
        self._large: deque[Entry] = deque()
        self._small_bytes = 0
        self._bytes = 0
        self._left_early: OrderedDict[BlockKey, None] = OrderedDict()
        self._sweep_at = FIRST_SWEEP

    def arrived(self, path: Sequence[BlockKey]) -> None: ...
    def finished(self, path: Sequence[BlockKey], kind: Kind) -> None: ...

    def entered(self, entry: Entry) -> None:
        key = entry.block.address.key
        known = key in self._left_early
        if known:
            del self._left_early[key]
        self._standing[key] = standing = _Standing(entry.size, in_small=not known)
        self._bytes += standing.size
        if standing.in_small:
            self._small_bytes += standing.size

    def used(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            standing = self._standing.get(entry.block.address.key)
            if standing is not None and standing.uses < MAX_USES:
                standing.uses += 1

    def offered(self, entry: Entry) -> None:
        standing = self._standing.get(entry.block.address.key)
        if standing is None:
            return
        if not standing.queued:
            standing.queued = True
            (self._small if standing.in_small else self._large).append(entry)
            if len(self._small) + len(self._large) > self._sweep_at:
                self._sweep()

    def removed(self, entry: Entry) -> None:
        key = entry.block.address.key
        standing = self._standing.pop(key, None)
        if standing is None:
            return
        self._bytes -= standing.size
        if standing.in_small:
            self._small_bytes -= standing.size
            self._left_early[key] = None
            while len(self._left_early) > max(1, len(self._standing)):
                self._left_early.popitem(last=False)

    def victim(self) -> Entry | None:
        while self._small or self._large:
            from_small = self._small and (self._small_bytes > SMALL_SHARE * self._bytes or not self._large)
            entry = (self._small if from_small else self._large).popleft()
            standing = self._standing.get(entry.block.address.key)
            if standing is None or entry.gone:
                continue
            standing.queued = False
            if not self._wanted(entry):
                continue
            if not standing.uses:
                return entry
            if standing.in_small:
                standing.in_small = False
                standing.uses = 0
                self._small_bytes -= standing.size
            else:
                standing.uses -= 1
            self.offered(entry)
        return None

    def admits(self, newcomer: Entry, victim: Entry) -> bool:
        return True

    def expects(self, key: BlockKey) -> float:
        return 0.0

    def _sweep(self) -> None:
        """Forget who has left, so that they do not pile up where nobody asks for a victim."""
        self._small, self._large = (deque(filter(self._stays, queue)) for queue in (self._small, self._large))
        self._sweep_at = 2 * (len(self._small) + len(self._large)) + FIRST_SWEEP

    def _stays(self, entry: Entry) -> bool:
        return not entry.gone and entry.block.address.key in self._standing
