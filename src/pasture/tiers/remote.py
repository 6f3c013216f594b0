"""The remote tier: blocks in stores that several machines share. What one replica has computed, another restores.

    SlowTier calls ─► wire (bytes, perhaps encrypted) ─► Ring (which server) ─► Server (limits, breaker) ─► Shelf

Owns the policy: which question goes where, how long it may take, what counts. A question is one round trip for a whole path; a
read is bounded by what its lift has left; everything that goes wrong is a miss. Nothing that comes over the network is trusted:
`Wire.decode` verifies it, and the address must be the one that was asked for. Names are rooted in the model's fingerprint and
in the namespace, so a replica with another model, or under another key, asks for names that nobody has written. Background
threads call it, several at once; `accepts` and `statistics` wait for nothing.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from threading import Lock
from typing import TypeVar

from pasture.core.ports import Clock
from pasture.core.storage import BLOCK_TOKENS, BlockKey, Bytes, RemoteStatistics, TierStatistics
from pasture.tiers.block import Block
from pasture.tiers.keys import Address
from pasture.tiers.pace import Pace, Speed
from pasture.tiers.remote_ports import CHILDREN, Shelf
from pasture.tiers.remote_ring import Ring
from pasture.tiers.remote_server import Server
from pasture.tiers.trouble import Complaints
from pasture.tiers.wire import HEADER_BYTES, BadBlock, PlainWire, Wire, read_header

log = logging.getLogger(__name__)

T = TypeVar("T")

BATCH_BYTES = 4 << 20
"""in one read: long enough that round trips do not count, short enough that others' questions get in between"""
PATIENT_SECONDS = 1.0
"""a read that was given less time proves nothing by not being done"""
WRITE_SECONDS = 10.0
"""for one block, in the background"""
USUAL = Speed(1e-3, 500e6)
HALF_LIFE_SECONDS = 5.0
"""a network that was slow is given another chance soon"""
CLOSE_SECONDS = 3.0


class RemoteTier:
    """See the module and `SlowTier`. The tier closes the servers."""

    name = "remote"
    batch_bytes = BATCH_BYTES

    def __init__(
        self,
        ring: Ring,
        *,
        kind: str,
        transport: str,
        lookup_seconds: float,
        wire: Wire | None = None,
        list_all: bool = True,
        clock: Clock = time.monotonic,
    ) -> None:
        """`list_all`: enlist full blocks too, of which a prompt that parts midway uses the beginning; the last of a
        conversation, which has no full length, is always found. `clock`: the one that the servers have."""
        self._ring = ring
        self._kind = kind
        self._transport = transport
        self._lookup_seconds = lookup_seconds
        self._wire: Wire = PlainWire() if wire is None else wire
        self._sealed = wire is not None
        self._list_all = list_all
        self._clock = clock
        self._complaints = Complaints(log, clock)
        self._lock = Lock()
        self._counts = dict.fromkeys(("hit", "missed", "written", "read", "damaged", "in_flight"), 0)
        self._pace = Pace(USUAL, clock, half_life_seconds=HALF_LIFE_SECONDS)

    @property
    def accepts(self) -> bool:
        return any(server.accepts for server in self._ring.servers)

    def stored(self, path: Sequence[Address], before: Sequence[Address] = (), *, use: bool = True) -> Sequence[bool]:
        names = [self._wire.name(address.key) for address in path]
        found = self._found(names, [self._wire.name(address.key) for address in before], self._soon())
        there = [name in found for name in names]
        if use:  # the servers cannot tell
            self._count(missed=sum(a.p1 - a.p0 for a, is_there in zip(path, there, strict=True) if not is_there))
        return there

    def following(self, parents: Sequence[BlockKey]) -> Sequence[Sequence[tuple[Address, array[int]]]]:
        deadline = self._soon()
        names = [self._wire.name(parent) for parent in parents]
        heads: defaultdict[bytes, list[bytes]] = defaultdict(list)
        for part, lists in self._ask(names, _children, deadline):
            for name, found in zip(part, lists, strict=True):
                heads[name] += found
        listed = [self._identified(heads[name]) for name in names]
        there = self._found([self._wire.name(address.key) for each in listed for address, _ in each], (), deadline)
        return [[one for one in each if self._wire.name(one[0].key) in there][:CHILDREN] for each in listed]

    def get_batch(self, addresses: Sequence[Address], timeout_seconds: float) -> Sequence[Block | None]:
        started = self._clock()
        blocks: dict[bytes, Block] = {}
        wanted = {self._wire.name(address.key): address for address in addresses}
        n_bytes = 0
        for turn in range(self._ring.replicas):
            missing = [name for name in wanted if name not in blocks]
            for name, data in self._read(missing, turn, started + timeout_seconds):
                n_bytes += data.nbytes
                if (block := self._decoded(name, data, wanted[name])) is not None:
                    blocks[name] = block
        if n_bytes:
            self._pace.observe(n_bytes, self._clock() - started)
        found = [blocks.get(self._wire.name(address.key)) for address in addresses]
        n_hit = sum(len(block.tokens) for block in found if block is not None)
        self._count(read=n_bytes, hit=n_hit, missed=sum(a.p1 - a.p0 for a in addresses) - n_hit)
        return found

    def put(self, block: Block) -> bool:
        name = self._wire.name(block.address.key)
        holders = [server for server in self._ring.of(name) if server.accepts]
        if not holders:
            return False
        self._count(in_flight=block.n_bytes)
        try:
            return self._put(name, block, holders)
        finally:
            self._count(in_flight=-block.n_bytes)

    def remove(self, key: BlockKey) -> None:
        name = self._wire.name(key)
        self._all(self._ring.of(name), _doing(lambda shelf: shelf.remove(name)))

    def statistics(self) -> TierStatistics:
        servers = self._ring.servers
        usages = [server.usage for server in servers]
        with self._lock:
            counts = dict(self._counts)
        remote = tuple(server.statistics() for server in servers)
        warnings = tuple(warning for server in servers for warning in server.warnings)
        return TierStatistics(
            name=self.name,
            blocks=sum(usage.blocks for usage in usages),
            bytes=sum(usage.bytes for usage in usages),
            budget_bytes=sum(usage.budget_bytes for usage in usages),
            pinned_bytes=0,
            in_flight_bytes=counts["in_flight"],
            bytes_by_form={},
            hit_tokens=counts["hit"],
            missed_tokens=counts["missed"],
            written_bytes=counts["written"],
            read_bytes=counts["read"],
            evicted_blocks=0,
            damaged_blocks=counts["damaged"],
            errors=sum(server.failures for server in remote),
            latency_seconds=max(server.round_trip_seconds for server in remote),
            bytes_per_second=self._pace.speed.bytes_per_second,
            remote=RemoteStatistics(self._kind, self._transport, self._sealed, warnings, remote),
        )

    def close(self) -> None:
        deadline = self._clock() + CLOSE_SECONDS
        for server in self._ring.servers:
            server.close(max(0.0, deadline - self._clock()))

    # Inside

    def _soon(self) -> float:
        return self._clock() + self._lookup_seconds

    def _ask(
        self, names: Iterable[bytes], question: Callable[[Shelf, list[bytes]], T], deadline: float
    ) -> list[tuple[list[bytes], T]]:
        """Ask every server that holds some of these names about them, all at once; what was asked with what was answered."""
        parts: defaultdict[Server, list[bytes]] = defaultdict(list)
        for name in names:
            for server in self._ring.of(name):
                parts[server].append(name)
        asked = [(part, server.ask(partial(_swapped, question, part))) for server, part in parts.items()]
        answers = [(part, one.answer(deadline)) for part, one in asked]
        return [(part, answer) for part, answer in answers if answer is not None]

    def _found(self, names: Sequence[bytes], before: Sequence[bytes], deadline: float) -> set[bytes]:
        """Which names are there; the servers that hold those `before` learn that they are in use."""
        leading = frozenset(before)

        def question(shelf: Shelf, part: list[bytes]) -> list[bytes]:
            wanted = [name for name in part if name not in leading]
            there = shelf.stored(wanted, [name for name in part if name in leading])
            return [name for name, is_there in zip(wanted, there, strict=True) if is_there]

        answers = self._ask([*names, *before], question, deadline) if names else []
        return {name for _, found in answers for name in found}

    def _read(self, names: Sequence[bytes], turn: int, deadline: float) -> list[tuple[bytes, Bytes]]:
        """What the server whose `turn` it is has of these names."""
        parts: defaultdict[Server, list[bytes]] = defaultdict(list)
        for name in names:
            holders = self._ring.of(name)
            if turn < len(holders):
                parts[holders[turn]].append(name)
        patient = deadline - self._clock() >= PATIENT_SECONDS
        asked = [(part, server.ask(partial(_read, part))) for server, part in parts.items()]
        answers = [(part, one.answer(deadline, counts=patient)) for part, one in asked]
        return [
            (name, data)
            for part, answer in answers
            if answer is not None
            for name, data in zip(part, answer, strict=True)
            if data is not None
        ]

    def _decoded(self, name: bytes, data: Bytes, address: Address) -> Block | None:
        try:
            block = self._wire.decode(data)
            if block.address != address:
                raise BadBlock("it is another block's")
        except BadBlock as error:
            self._count(damaged=1)
            self._complaints.about("damage", f"a block in the remote store was damaged and is dropped: {error}")
            self._all(self._ring.of(name), _doing(lambda shelf: shelf.remove(name)))
            return None
        return block

    def _identified(self, heads: Iterable[bytes]) -> list[tuple[Address, array[int]]]:
        """What these heads say, each address once; a head that says nothing sensible is left out."""
        found: dict[Address, array[int]] = {}
        for head in heads:
            try:
                address, tokens = self._wire.identify(read_header(head), head[HEADER_BYTES:])
            except BadBlock as error:
                log.debug("a head in the remote store is damaged: %s", error)
                continue
            found.setdefault(address, tokens)
        return list(found.items())

    def _put(self, name: bytes, block: Block, holders: Sequence[Server]) -> bool:
        """Whether a server has it now."""
        there = self._all(holders, lambda shelf: shelf.stored([name], ())[0])
        lacking = [server for server in holders if not there.get(server)]
        if not lacking:
            return True
        head, payload = self._wire.encode(block)
        written = self._all(lacking, _doing(lambda shelf: shelf.write(name, head, payload)))
        for server in written:
            server.wrote()
        self._count(written=len(written) * (len(head) + payload.nbytes))
        if not written and not any(there.values()):
            return False
        if self._list_all or block.whole or len(block.tokens) < BLOCK_TOKENS:
            parent = self._wire.name(block.address.parent)
            self._all(self._ring.of(parent), _doing(lambda shelf: shelf.enlist(parent, head)))
        return True

    def _all(self, servers: Iterable[Server], call: Callable[[Shelf], T]) -> dict[Server, T]:
        """Ask these servers in the background of everything; what was answered."""
        deadline = self._clock() + WRITE_SECONDS
        asked = [(server, server.ask(call)) for server in servers]
        answers = [(server, one.answer(deadline)) for server, one in asked]
        return {server: answer for server, answer in answers if answer is not None}

    def _count(self, **increments: int) -> None:
        with self._lock:
            for name, increment in increments.items():
                self._counts[name] += increment


def _swapped(question: Callable[[Shelf, list[bytes]], T], part: list[bytes], shelf: Shelf) -> T:
    return question(shelf, part)


def _children(shelf: Shelf, part: list[bytes]) -> Sequence[Sequence[bytes]]:
    return shelf.children(part)


def _read(part: list[bytes], shelf: Shelf) -> Sequence[Bytes | None]:
    return shelf.read(part)


def _doing(call: Callable[[Shelf], None]) -> Callable[[Shelf], bool]:
    """The call with an answer: that it was done."""

    def done(shelf: Shelf) -> bool:
        call(shelf)
        return True

    return done
