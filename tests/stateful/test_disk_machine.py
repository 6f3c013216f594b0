"""Random use of a disk cache by two servers, with restarts and damage in between, against what was put into it.

Whatever comes back must be what was put; what is promised must be there unless somebody took it; the budget holds, and one
owner's limit.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pasture.core.values import Allowance
from pasture.tiers.block import Block
from pasture.tiers.disk import DiskTier
from pasture.tiers.sealed import SealedWire
from pasture.tiers.wire import Wire
from tests.blocks import block_at, conversation, leading, path, root, same

BUDGET_BYTES = 12_000
LIMIT_BYTES = 5_000
"""of the second namespace, once it has one"""
LENGTHS = (1, 63, 64, 65, 128, 150, 200)
NAMESPACES = ("one", "two")

tiers = st.integers(0, 1)
seeds = st.integers(0, 3)
lengths = st.sampled_from(LENGTHS)
namespaces = st.sampled_from(NAMESPACES)


class DiskMachine(RuleBasedStateMachine):
    wire: Wire | None = None

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.now = 1_000_000.0
        self.put_ever: set[bytes] = set()
        self.tiers = [self._open(), self._open()]

    def _open(self) -> DiskTier:
        tier = DiskTier(self.directory, BUDGET_BYTES, wire=self.wire, clock=lambda: self.now, now=lambda: self.now)
        tier.allow(root("two"), Allowance(disk_bytes=LIMIT_BYTES))
        return tier

    def _blocks(self, seed: int, length: int, namespace: str) -> list[Block]:
        """Conversations that begin with the same tokens where their seeds are equal modulo two."""
        tokens = (conversation(seed % 2, 64) + conversation(10 + seed, 200))[:length]
        return [block_at(address, tokens, 500, owner=root(namespace)) for address in path(tokens, namespace)]

    @rule(tier=tiers, seed=seeds, length=lengths, namespace=namespaces)
    def put(self, tier: int, seed: int, length: int, namespace: str) -> None:
        for block in self._blocks(seed, length, namespace):
            self.tiers[tier].put(block)
            self.put_ever.add(block.address.key)
        found = self.tiers[tier].get(block.address)
        assert same(found, block) or (self.damaged and found is None), "what was put last is there; damage is found by reading"

    @rule(tier=tiers, seed=seeds, length=lengths, namespace=namespaces)
    def look_up(self, tier: int, seed: int, length: int, namespace: str) -> None:
        wanted = self._blocks(seed, length, namespace)
        n_stored = leading(self.tiers[tier], [block.address for block in wanted])
        assert all(block.address.key in self.put_ever for block in wanted[:n_stored])
        for index, block in enumerate(wanted):
            found = self.tiers[tier].get(block.address)
            assert found is None or same(found, block)
            assert found is not None or index >= n_stored or self.damaged

    @rule(tier=tiers, seed=seeds, length=lengths, namespace=namespaces)
    def look_behind(self, tier: int, seed: int, length: int, namespace: str) -> None:
        block = self._blocks(seed, length, namespace)[-1]
        for address, tokens in self.tiers[tier].following([block.address.parent])[0]:
            assert address.parent == block.address.parent
            assert address.key in self.put_ever
            assert len(tokens) == address.p1 - address.p0 <= 64

    @rule(tier=tiers, seed=seeds, length=lengths, namespace=namespaces)
    def remove(self, tier: int, seed: int, length: int, namespace: str) -> None:
        block = self._blocks(seed, length, namespace)[-1]
        self.tiers[tier].remove(block.address.key)
        assert self.tiers[1 - tier].get(block.address) is None

    @rule(tier=tiers)
    def restart(self, tier: int) -> None:
        self.tiers[tier].close()
        self.tiers[tier] = self._open()

    @rule(seconds=st.sampled_from((0.5, 5.0, 100.0)))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        for tier in self.tiers:
            tier.allow(root("two"), Allowance(disk_bytes=LIMIT_BYTES))

    damaged = False

    @precondition(lambda self: self._files())
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        file = data.draw(st.sampled_from(self._files()))
        content = bytearray(file.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        file.write_bytes(content)
        self.damaged = True

    @precondition(lambda self: self._files())
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self._files())).unlink()
        self.damaged = True

    @rule()
    def lose_the_index(self) -> None:
        for file in self.directory.rglob("index*"):
            file.unlink()

    @invariant()
    def budget_and_books(self) -> None:
        counted = {tier.statistics().bytes for tier in self.tiers}
        on_disk = sum(file.stat().st_size for file in self._files())
        assert len(counted) == 1, "both see the same"
        assert on_disk <= counted.pop() <= BUDGET_BYTES if self.damaged else {on_disk} == counted
        assert all(tier.statistics().errors == 0 for tier in self.tiers)
        held = self.tiers[0].bytes_by_owner()
        assert sum(held.values()) == self.tiers[0].statistics().bytes
        assert held.get(root("two"), 0) <= LIMIT_BYTES

    def _files(self) -> list[Path]:
        return sorted(self.directory.rglob("*.kv"))

    def teardown(self) -> None:
        for tier in self.tiers:
            tier.close()
        shutil.rmtree(self.directory)


class SealedDiskMachine(DiskMachine):
    wire = SealedWire(bytes(range(32)))


TestDisk = DiskMachine.TestCase
TestDisk.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestSealedDisk = SealedDiskMachine.TestCase
TestSealedDisk.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
