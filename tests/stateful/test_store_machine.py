"""Random use of the store against what was ever put into it: everything taken equals what was put, whatever happened since.

Rules: conversations are stored and grow, prompts part from them anywhere, blocks are pinned, squeezed and evicted, the budget
moves, the server restarts over its slow tier, stored payloads are damaged. The slabs carry a mark a cell that depends on every
token before it, so a block in the wrong place cannot go unnoticed. After every rule the books of the RAM tier are checked.
"""

from __future__ import annotations

import threading
import time
from array import array
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from pasture.core.storage import BLOCK_TOKENS, Pin
from pasture.core.values import Allowance, Namespace
from pasture.foresight.policies import POLICIES
from pasture.tiers.compression import EVERY_FORM, Compression, Squeezer, ladder
from pasture.tiers.entries import size_of
from pasture.tiers.gate import OpenGate
from pasture.tiers.memory import MemoryTier
from pasture.tiers.store import TieredStore
from tests.tier_support import PlainCodec, ShelfTier, cells_of, slab_of, toks

NAMES = st.sampled_from([Namespace("a"), Namespace("b")])
ENDS = st.integers(0, 3)
SHARES = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
"""of what there turns out to be: threads run beside the rules, so no draw may depend on the store's state"""
LENGTHS = st.sampled_from([1, 10, 63, 64, 65, 100, 128, 190, 192, 250])


@st.composite
def prompts(draw: st.DrawFn) -> array[int]:
    """A common stem, then one of few continuations from anywhere: prefixes meet inside blocks and at their edges."""
    stem, length = draw(LENGTHS), draw(LENGTHS)
    branch = draw(ENDS)
    return toks([*range(stem), *(1000 * branch + i for i in range(length))] if branch else range(stem + length))


def agreeing(a: array[int], b: array[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class StoreMachine(RuleBasedStateMachine):
    divisible = True
    policy = "lru"

    damaged = False

    @initialize(budget_blocks=st.sampled_from([2, 6, 1000]))
    def start(self, budget_blocks: int) -> None:
        self.codec = PlainCodec(pad_bytes=500)
        full = self.codec.pack(slab_of(toks(range(BLOCK_TOKENS)), 0, BLOCK_TOKENS)).nbytes
        self.budget = budget_blocks * (full + 1536)
        self.shelf = ShelfTier()
        self.stored: list[tuple[Namespace, array[int]]] = []
        self.pins: list[tuple[Namespace, array[int], int, Pin]] = []
        self.open()

    def open(self) -> None:
        steps = len(ladder(Compression.AUTO))
        policy = POLICIES[self.policy](time.monotonic)
        self.memory = MemoryTier(self.budget, divisible=self.divisible, policy=policy, n_writers=1, squeeze_stages=steps)
        self.store = TieredStore(self.codec, self.memory, OpenGate(), slow=(self.shelf,))
        self.squeezer = Squeezer(self.memory, self.codec, Compression.AUTO, EVERY_FORM)

    # Storing and looking

    @rule(name=NAMES, tokens=prompts())
    def arrive(self, name: Namespace, tokens: array[int]) -> None:
        self.store.arrived(name, tokens)

    @rule(name=NAMES, tokens=prompts())
    def put(self, name: Namespace, tokens: array[int]) -> None:
        gap = self.store.gap(name, tokens, 0)
        assert gap == len(tokens) or gap % BLOCK_TOKENS == 0
        if gap < len(tokens):
            self.store.put(name, tokens, slab_of(tokens, gap, len(tokens)))
        self.stored.append((name, tokens))
        if self.budget >= 1000 * 500 and self.memory.budget_bytes == self.budget:
            assert self.store.gap(name, tokens, 0) == len(tokens)
            assert self.store.reach(name, tokens) == len(tokens)

    @precondition(lambda self: self.stored)
    @rule(data=st.data(), more=LENGTHS)
    def grow(self, data: st.DataObject, more: int) -> None:
        name, tokens = data.draw(st.sampled_from(self.stored))
        if len(tokens) < 600:
            self.put(name, toks([*tokens, *(5000 + i for i in range(more))]))

    @rule(name=NAMES, tokens=prompts(), begin=SHARES, end=SHARES)
    def take(self, name: Namespace, tokens: array[int], begin: float, end: float) -> None:
        reach = self.store.reach(name, tokens)
        known = [agreeing(tokens, stored) for owner, stored in self.stored if owner == name]
        assert reach <= max(known, default=0)
        if not reach:
            return
        p1 = max(1, int(end * reach)) if self.divisible else reach
        p0 = min(p1 - 1, int(begin * p1)) if self.divisible else 0
        slabs = self.store.take(name, tokens, p0, p1)
        if self.damaged and not slabs:
            assert self.memory.statistics().damaged_blocks
            assert self.store.reach(name, tokens) < p1
        else:
            assert cells_of(slabs) == list(slab_of(tokens, p0, p1).cells)

    @rule(name=NAMES, tokens=prompts(), p0=LENGTHS)
    def take_anything(self, name: Namespace, tokens: array[int], p0: int) -> None:
        """Also what is not reachable from the root: it is right, or it is nothing."""
        if p0 < len(tokens):
            slabs = self.store.take(name, tokens, p0, len(tokens))
            assert not slabs or cells_of(slabs) == list(slab_of(tokens, p0, len(tokens)).cells)

    # Pins

    @rule(name=NAMES, tokens=prompts())
    def pin(self, name: Namespace, tokens: array[int]) -> None:
        reach = self.store.reach(name, tokens)
        self.pins.append((name, tokens, reach, self.store.pin(name, tokens)))

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        *_, pin = self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1)))
        pin.release()
        pin.release()

    # Pressure

    @rule(n_steps=st.integers(1, 20), part=st.sampled_from([1, 2, 10]))
    def squeeze(self, n_steps: int, part: int) -> None:
        self.memory.resize(max(self.budget // part, self.memory.used_bytes))
        for _ in range(n_steps):
            if not self.squeezer.step():
                break

    @rule(part=st.sampled_from([1, 1, 2, 4]))
    def resize(self, part: int) -> None:
        self.memory.resize(self.budget // part)

    @rule()
    def trim(self) -> None:
        self.memory.trim()

    @rule(name=NAMES, limit=st.sampled_from([None, 3, 20]), share=st.sampled_from([None, 0.0, 0.6]))
    def allow(self, name: Namespace, limit: int | None, share: float | None) -> None:
        n_bytes = None if limit is None else limit * self.budget // 8
        self.store.allow(name, Allowance(ram_bytes=n_bytes, guaranteed_share=share))

    # The slow tier

    @rule()
    def restart(self) -> None:
        for *_, pin in self.pins:
            pin.release()
        self.pins.clear()
        assert self.store.flush(20)
        self.store.close()
        self.open()

    @rule(name=NAMES, tokens=prompts(), ram_tells=st.booleans())
    def lift(self, name: Namespace, tokens: array[int], ram_tells: bool) -> None:
        before = self.store.reach(name, tokens)
        ready = threading.Event()
        lift = self.store.lift(name, tokens, before if ram_tells else 0, ready.set)
        if lift is None:
            return
        assert ready.wait(20)
        assert self.store.reach(name, tokens) >= before
        lift.release()

    @rule(which=SHARES, kind=st.integers(0, 2))
    def damage(self, which: float, kind: int) -> None:
        """On the slow tier: what such a tier lets through is caught by the store or the codec."""
        assert self.store.flush(20)
        if not self.shelf.blocks:
            return
        self.damaged = True
        keys = list(self.shelf.blocks)
        key = keys[int(which * (len(keys) - 1))]
        block = self.shelf.blocks[key]
        if kind == 0:
            self.shelf.blocks[key] = replace(block, payload=block.payload[:-1])
        elif kind == 1:
            self.shelf.blocks[key] = replace(block, tokens=toks([token + 1 for token in block.tokens]))
        else:
            self.shelf.blocks[key] = replace(block, address=replace(block.address, p0=block.address.p0 + BLOCK_TOKENS))

    @invariant()
    def books_add_up(self) -> None:
        if not hasattr(self, "memory"):
            return
        self.memory.check()
        statistics = self.memory.statistics()
        assert statistics.bytes == sum(statistics.bytes_by_form.values())
        slack = max((size_of(entry.block) for entry in self.memory._index.values()), default=0)
        assert statistics.bytes <= max(statistics.budget_bytes, statistics.pinned_bytes + self._held(), slack)

    def _held(self) -> int:
        """Bytes of blocks that something pinned hangs from."""
        held = [entry for entry in self.memory._index.values() if not self.memory._evictable(entry)]
        return sum(entry.size for entry in held)

    @invariant()
    def nothing_pinned_is_lost(self) -> None:
        for name, tokens, reach, _ in getattr(self, "pins", ()):
            assert self.damaged or self.store.reach(name, tokens) >= reach

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()


class CheckpointMachine(StoreMachine):
    divisible = False


class ForesightMachine(StoreMachine):
    policy = "foresight"


class ForesightCheckpointMachine(CheckpointMachine):
    policy = "foresight"


class S3FifoMachine(StoreMachine):
    policy = "s3fifo"


@pytest.mark.parametrize(
    "machine", [StoreMachine, CheckpointMachine, ForesightMachine, ForesightCheckpointMachine, S3FifoMachine]
)
def test_the_store_keeps_its_promises(machine: type[StoreMachine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]),
    )
