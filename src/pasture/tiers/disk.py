"""The disk tier: blocks in a directory that outlives the process, within a budget of bytes.

    SlowTier calls ─► circuits (a failing disk is left alone) ─► wire (bytes, perhaps encrypted) ─► DiskCache (files, index)

Owns the policy: what a failure means (a miss, or a write that is skipped, with one warning), when to make room, what counts as
used, how fast the disk is, what each owner may have. A file that cannot be read is damaged; when several in a row cannot, it is
the disk that fails. The budget is that of the directory, whoever writes to it: totals are in the shared index. Nothing read
from disk is trusted: `Wire.decode` verifies it, and the address must be the one that was asked for. Background threads call it,
several at once.
"""

from __future__ import annotations

import errno
import logging
import time
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from threading import Lock

from pasture.core.shares import Shares
from pasture.core.storage import BlockKey, TierStatistics
from pasture.core.values import Allowance, Form
from pasture.tiers.block import Block
from pasture.tiers.disk_cache import DiskCache
from pasture.tiers.disk_files import USUAL, private_directory
from pasture.tiers.disk_index import IndexUnavailable
from pasture.tiers.disk_rows import Row
from pasture.tiers.keys import Address
from pasture.tiers.pace import Pace, Speed
from pasture.tiers.trouble import Circuit, Complaints
from pasture.tiers.wire import HEADER_BYTES, NOBODY, BadBlock, Header, PlainWire, Wire

log = logging.getLogger(__name__)

LOW_WATERMARK = 0.95
"""where the budget is exceeded, room is made down to this share of it"""
NOTED_NAMES = 256
NOTED_SECONDS = 2.0
"""uses are entered into the index together, when there are so many or so old ones"""
CHILDREN = 8
"""blocks behind one parent that are offered"""

UNREADABLE_IN_A_ROW = 2
"""files that are damaged when they cannot be read; where more follow, it is the disk"""

_FAILURES = (OSError, IndexUnavailable, MemoryError)
_OF_THE_PROCESS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""say nothing about the file that could not be read"""


class DiskTier:
    """See the module and `SlowTier`. `clock` is monotonic, `now` counts from the epoch; both in seconds."""

    name = "disk"
    batch_bytes = 0
    """a file after the other"""

    def __init__(
        self,
        directory: Path,
        budget_bytes: int,
        *,
        wire: Wire | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Open the cache in `directory`, or begin one. Raises ConfigError where the directory cannot be trusted."""
        self._cache = DiskCache(private_directory(directory), clock)
        self._budget_bytes = budget_bytes
        self._wire: Wire = PlainWire() if wire is None else wire
        self._clock = clock
        self._now = now
        self._reads, self._writes = Circuit(clock), Circuit(clock)
        self._complaints = Complaints(log, clock)
        self._lock = Lock()
        self._counts = dict.fromkeys(("hit", "missed", "written", "read", "evicted", "damaged", "errors", "in_flight"), 0)
        self._used: dict[bytes, int] = {}
        self._used_since = clock()
        self._unreadable = 0
        """files that could not be read since one could"""
        self._totals: Mapping[Form, tuple[int, int]] = {}
        self._shares: Shares[bytes] = Shares(_disk_bytes, clock)
        self._pace = Pace(self._start(), clock)

    @property
    def accepts(self) -> bool:
        return self._writes.allows

    def stored(self, path: Sequence[Address], before: Sequence[Address] = (), *, use: bool = True) -> Sequence[bool]:
        names = [self._wire.name(address.key) for address in path]
        found: set[bytes] = set()
        if names and self._reads.allows:
            try:
                found = self._cache.index.stored(names)
                if use and (last := next((name for name in reversed(names) if name in found), None)):
                    self._note_use(last, hits=0)  # which the index takes for a use of what leads up to it as well
            except _FAILURES as error:
                self._failed(self._reads, "be looked up", error)
        there = [name in found for name in names]
        if use:
            self._count(missed=sum(one.p1 - one.p0 for one, is_there in zip(path, there, strict=True) if not is_there))
        return there

    def following(self, parents: Sequence[BlockKey]) -> Sequence[Sequence[tuple[Address, array[int]]]]:
        return [self._behind(parent) if self._reads.allows else () for parent in parents]

    def _behind(self, parent: BlockKey) -> Sequence[tuple[Address, array[int]]]:
        found: list[tuple[Address, array[int]]] = []
        try:
            for row in self._cache.index.children(self._wire.name(parent), CHILDREN):
                section = row.tokens or b""
                header = _header(row, section)
                try:
                    found.append(self._wire.identify(header, section))
                except BadBlock as error:
                    self._damaged(row.name, error)
        except _FAILURES as error:
            self._failed(self._reads, "be looked up", error)
        return found

    def get_batch(self, addresses: Sequence[Address], timeout_seconds: float) -> Sequence[Block | None]:
        return [self.get(address) for address in addresses]

    def get(self, address: Address) -> Block | None:
        """One block; see `get_batch`."""
        block = self._get(address) if self._reads.allows else None
        n_tokens = address.p1 - address.p0
        self._count(hit=n_tokens if block is not None else 0, missed=n_tokens if block is None else 0)
        return block

    def put(self, block: Block) -> bool:
        if not self._writes.allows:
            return False
        n_bytes = block.n_bytes
        self._count(in_flight=n_bytes)
        try:
            if self._store(block):
                self._writes.succeeded()
        except _FAILURES as error:
            self._failed(self._writes, "be written", error)
            return False
        finally:
            self._count(in_flight=-n_bytes)
        return True

    def allow(self, owner: BlockKey, allowance: Allowance) -> None:
        """The owner asks for something, under these terms. Any thread; at once."""
        name = self._wire.name(owner)
        with self._lock:
            self._shares.allow(name, allowance)

    def bytes_by_owner(self) -> Mapping[bytes, int]:
        """What is on whose account, by the owners' names. Raises IndexUnavailable."""
        return self._cache.index.bytes_by_owner()

    def remove(self, key: BlockKey) -> None:
        try:
            self._cache.discard(self._wire.name(key))
        except _FAILURES as error:
            self._failed(self._writes, "be written", error)

    def expire(self, unused_seconds: float, own_seconds: Mapping[BlockKey, float], in_use: Collection[BlockKey]) -> None:
        now = self._now()
        with self._lock:
            for key in in_use:
                self._used.setdefault(self._wire.name(key), 0)
        own = {self._wire.name(owner): now - seconds for owner, seconds in own_seconds.items()}
        try:
            self._enter_uses()
            self._count(evicted=len(self._cache.expire(now - unused_seconds, own)))
        except _FAILURES as error:
            self._failed(self._writes, "be written", error)

    def statistics(self) -> TierStatistics:
        try:
            self._totals = self._cache.index.totals()
        except IndexUnavailable as error:
            self._failed(self._reads, "be looked up", error)
        with self._lock:
            counts = dict(self._counts)
        speed = self._pace.speed
        return TierStatistics(
            name=self.name,
            blocks=sum(n_blocks for n_blocks, _ in self._totals.values()),
            bytes=sum(n_bytes for _, n_bytes in self._totals.values()),
            budget_bytes=self._budget_bytes,
            pinned_bytes=0,
            in_flight_bytes=counts["in_flight"],
            bytes_by_form={form: n_bytes for form, (_, n_bytes) in self._totals.items()},
            hit_tokens=counts["hit"],
            missed_tokens=counts["missed"],
            written_bytes=counts["written"],
            read_bytes=counts["read"],
            evicted_blocks=counts["evicted"],
            damaged_blocks=counts["damaged"],
            errors=counts["errors"],
            latency_seconds=speed.latency_seconds,
            bytes_per_second=speed.bytes_per_second,
        )

    def close(self) -> None:
        try:
            self._enter_uses()
        except IndexUnavailable as error:
            log.debug("the last uses are not in the index: %s", error)
        self._cache.close()

    # Inside

    def _start(self) -> Speed:
        """Make the directory ready; the speed of its disk."""
        files = self._cache.files
        try:
            files.create()
            self._cache.settle(self._now())
            for owner in self.bytes_by_owner():
                if owner != NOBODY:
                    self._shares.allow(owner, Allowance())  # until it says otherwise, so that others begin no sooner than it
            self._make_room(0)
            return files.probe()
        except _FAILURES as error:
            self._failed(self._writes, "be written", error)
            return USUAL

    def _get(self, address: Address) -> Block | None:
        name = self._wire.name(address.key)
        begin = self._clock()
        try:
            try:
                data = self._cache.files.read(name)
                block = self._wire.decode(data)
                if block.address != address:
                    raise BadBlock("it is another block's")
            except FileNotFoundError:
                self._cache.index.drop([name])
                return None
            except BadBlock as error:
                self._damaged(name, error)
                return None
            except OSError as error:
                if not self._is_damage(error):
                    raise
                self._damaged(name, error)
                return None
            self._pace.observe(data.nbytes, self._clock() - begin)
            self._count(read=data.nbytes)
            self._note_use(name, hits=1)
            self._unreadable = 0
            self._reads.succeeded()
        except _FAILURES as error:
            self._failed(self._reads, "be read", error)
            return None
        return block

    def _store(self, block: Block) -> bool:
        """Whether something was written."""
        name = self._wire.name(block.address.key)
        if self._cache.index.stored([name]) and self._cache.files.exists(name):
            self._note_use(name, hits=0)
            return False
        head, payload = self._wire.encode(block)
        n_bytes = len(head) + payload.nbytes
        if n_bytes > self._budget_bytes:
            self._complaints.about("size", f"a block of {n_bytes} bytes is larger than the disk cache's budget and is not kept")
            return False
        self._enter_uses()
        if block.owner is not None and not self._keep_within(self._wire.name(block.owner), n_bytes):
            return False
        self._make_room(n_bytes)
        self._cache.add(head, payload, self._now())
        self._count(written=n_bytes)
        return True

    def _make_room(self, n_bytes: int) -> None:
        """Evict down to the low watermark where `n_bytes` more would exceed the budget."""
        self._totals = self._cache.index.totals()
        if sum(size for _, size in self._totals.values()) + n_bytes > self._budget_bytes:
            target = min(int(LOW_WATERMARK * self._budget_bytes), self._budget_bytes - n_bytes)
            self._count(evicted=len(self._cache.evict(target, guaranteed=self._guaranteed)))

    def _keep_within(self, owner: bytes, n_bytes: int) -> bool:
        """Evict what is coldest on its account where `n_bytes` more would exceed its limit; False for more than that."""
        with self._lock:
            limit = self._shares.limit(owner)
        if limit is None:
            return True
        if n_bytes > limit:
            return False
        if self.bytes_by_owner().get(owner, 0) + n_bytes > limit:
            target = min(int(LOW_WATERMARK * limit), limit - n_bytes)
            self._count(evicted=len(self._cache.evict_owner(owner, target)))
        return True

    def _guaranteed(self, owner: bytes) -> int:
        with self._lock:
            return self._shares.guaranteed(owner, self._budget_bytes)

    def _note_use(self, name: bytes, *, hits: int) -> None:
        """Remember a use for the index; enters all of them when it is time."""
        with self._lock:
            self._used[name] = self._used.get(name, 0) + hits
            due = len(self._used) >= NOTED_NAMES or self._clock() - self._used_since > NOTED_SECONDS
        if due:
            try:
                self._enter_uses()
            except IndexUnavailable as error:
                self._failed(self._writes, "be written", error)

    def _enter_uses(self) -> None:
        with self._lock:
            used, self._used, self._used_since = self._used, {}, self._clock()
        if used:
            self._cache.index.touch(used, self._now())

    def _is_damage(self, error: OSError) -> bool:
        """Whether a file that could not be read is to blame itself; counts it."""
        if error.errno in _OF_THE_PROCESS:
            return False
        with self._lock:
            self._unreadable += 1
            return self._unreadable <= UNREADABLE_IN_A_ROW

    def _damaged(self, name: bytes, error: BadBlock | OSError) -> None:
        self._count(damaged=1)
        self._complaints.about("damage", f"a file in the disk cache was damaged and is dropped: {error}")
        self._cache.discard(name)

    def _failed(self, circuit: Circuit, what: str, error: BaseException) -> None:
        circuit.failed()
        self._count(errors=1)
        self._complaints.about(
            what, f"the disk cache cannot {what} and is left alone for a while: {error or type(error).__name__}"
        )

    def _count(self, **increments: int) -> None:
        with self._lock:
            for name, increment in increments.items():
                self._counts[name] += increment


def _disk_bytes(allowance: Allowance) -> int | None:
    return allowance.disk_bytes


def _header(row: Row, section: bytes) -> Header:
    """The header of the row's file."""
    n_payload_bytes = max(0, row.n_bytes - HEADER_BYTES - len(section))
    return Header(
        row.form, row.whole, row.sealed, row.p0, row.p1, len(section), n_payload_bytes, row.name, row.parent, row.owner
    )
