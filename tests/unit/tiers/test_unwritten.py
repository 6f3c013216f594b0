"""Which blocks a writer has yet to take, when there are several writers behind RAM."""

from __future__ import annotations

import threading
from array import array
from dataclasses import replace
from functools import partial

import pytest

from pasture.core.storage import BlockKey
from pasture.core.values import Form
from pasture.tiers import writing
from pasture.tiers.block import Block
from pasture.tiers.compression import Compression, Squeezer
from pasture.tiers.gate import OpenGate
from pasture.tiers.keys import Address, chain, root_key
from pasture.tiers.memory import MemoryTier
from pasture.tiers.store import TieredStore
from pasture.tiers.writing import MAX_OFFERS
from tests import tier_support
from tests.blocks import block_at, blocks, conversation, path
from tests.remote_support import wait_for
from tests.tier_support import NAME, PlainCodec, ShelfTier, put, slab_of

TALK = conversation(1, 192)
FIRST, *_ = chain(root_key(PlainCodec().fingerprint, NAME), TALK)


@pytest.fixture
def memory() -> MemoryTier:
    return MemoryTier(1 << 20, n_writers=2)


def drained(memory: MemoryTier, writer: int) -> list[int]:
    """Where the blocks begin that this writer is given."""
    starts = []
    while (item := memory.next_unwritten(writer)) is not None:
        starts.append(item.block.address.p0)
    return starts


def test_each_writer_has_a_line_of_its_own(memory: MemoryTier) -> None:
    for block in blocks(TALK):
        memory.insert(block)
    assert drained(memory, 0) == [0, 64, 128]
    assert memory.unwritten_blocks(1) == 3, "who is slow loses nothing"
    assert drained(memory, 1) == [0, 64, 128]
    memory.check()


def test_what_came_from_a_tier_is_not_sent_back_to_it(memory: MemoryTier) -> None:
    for block in blocks(TALK):
        memory.insert_pinned(block, source=1).release()
    assert drained(memory, 1) == []
    assert drained(memory, 0) == [0, 64, 128]


def test_what_was_not_taken_stands_aside_and_brings_its_claims_again(memory: MemoryTier) -> None:
    short, longer = conversation(2, 10), conversation(2, 10) + conversation(3, 10)
    memory.insert(block_at(path(short)[0], short))
    memory.insert(block_at(path(longer)[0], longer))
    for block in blocks(TALK):
        memory.insert(block)
    item = memory.next_unwritten(0)
    assert item is not None
    assert item.supersedes == (path(short)[0].key,)
    memory.put_back(0, item)
    memory.check()
    second = memory.next_unwritten(0)
    assert second is not None
    assert second.block.address.p0 == 0, "the next comes meanwhile"
    memory.put_back(0, second)
    assert memory.offer_again(0)
    assert memory.next_unwritten(0) == replace(item, refusals=1)
    memory.put_back(0, replace(item, refusals=1))
    assert not memory.offer_again(0), "what is asked for again comes first"
    assert memory.next_unwritten(0) == replace(second, refusals=1)
    assert drained(memory, 0) == [64, 128]
    assert memory.unwritten_blocks(0) == 1
    assert memory.offer_again(0)
    assert memory.next_unwritten(0) == replace(item, refusals=2)
    memory.put_back(0, item)
    memory.resize(0)
    memory.put_back(0, item)
    assert drained(memory, 0) == [], "what left RAM left every line"
    memory.check()


def test_each_writer_is_told_once_what_a_block_supersedes(memory: MemoryTier) -> None:
    talk = conversation(4, 60)
    for length in (10, 20, 30):
        memory.insert(block_at(path(talk[:length])[0], talk[:length]))
    for writer in (0, 1):
        item = memory.next_unwritten(writer)
        assert item is not None
        assert set(item.supersedes) == {path(talk[:10])[0].key, path(talk[:20])[0].key}
        assert memory.next_unwritten(writer) is None


def test_what_passes_by_is_kept_until_the_last_writer_has_it(memory: MemoryTier) -> None:
    block = next(blocks(TALK))
    assert memory.pass_by(block)
    assert memory.pass_by(block), "once is enough"
    held = memory.statistics().in_flight_bytes
    assert held >= block.n_bytes
    assert drained(memory, 0) == [0]
    assert memory.statistics().in_flight_bytes == held
    assert drained(memory, 1) == [0]
    assert memory.statistics().in_flight_bytes == 0
    memory.check()


class Refusing(ShelfTier):
    """Does not take one block, however often it is offered, but for the last time."""

    def __init__(self, name: str, key: BlockKey, refusals: int) -> None:
        super().__init__(name)
        self.key = key
        self.refusals = refusals

    def put(self, block: Block) -> bool:
        if block.address.key == self.key and self.refusals:
            self.refusals -= 1
            self.log.append(("refused", self.key))
            return False
        return super().put(block)

    def holds(self, n_blocks: int) -> bool:
        return len(self.blocks) == n_blocks


def store_over(*tiers: ShelfTier) -> TieredStore:
    store = TieredStore(PlainCodec(), MemoryTier(1 << 30, n_writers=len(tiers)), OpenGate(), slow=tiers)
    tier_support.OPENED.append(store)
    return store


def test_a_block_is_offered_again_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(writing, "PICTURE_SECONDS", 0.001)
    for refusals, n_there in ((MAX_OFFERS - 1, 3), (MAX_OFFERS, 2)):
        tier = Refusing("moody", FIRST.key, refusals)
        store = store_over(tier)
        put(store, TALK)
        assert store.flush(20)
        assert len(tier.blocks) == n_there


class NoMore(OpenGate):
    """Lets so many tokens be written, and no more at a time."""

    def spill_slow(self, tier: str, n_tokens: int, n_bytes: int) -> bool:
        return n_tokens <= 40


@pytest.mark.parametrize("by_the_gate", [True, False])
def test_a_shorter_block_stays_where_the_longer_one_is_not_taken(monkeypatch: pytest.MonkeyPatch, by_the_gate: bool) -> None:
    monkeypatch.setattr(writing, "AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(writing, "PICTURE_SECONDS", 0.001)
    talk = conversation(4, 60)
    longer = path(talk)[0]
    tier = ShelfTier() if by_the_gate else Refusing("moody", longer.key, refusals=MAX_OFFERS)
    memory = MemoryTier(1 << 20, n_writers=1)
    squeezer = Squeezer(memory, PlainCodec(), Compression.OFF, ())
    writer = writing.Writer(memory, 0, tier, NoMore() if by_the_gate else OpenGate(), squeezer)
    shorter = block_at(path(talk[:30])[0], talk[:30])
    memory.insert(shorter)
    assert writer.flush(20)
    memory.insert(block_at(longer, talk))
    assert writer.flush(20)
    assert list(tier.blocks) == [shorter.address.key]
    assert writer.stop(20)


def test_a_refused_block_waits_and_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "AGAIN_SECONDS", 3600.0)
    tier = Refusing("full for one", FIRST.key, refusals=10**6)
    store = store_over(tier)
    put(store, TALK)
    for n_there, seed in ((5, 7), (8, 8), (11, 9)):
        put(store, conversation(seed, 192))
        wait_for(partial(tier.holds, n_there))
    assert tier.calls("refused") == 1, "however often the writer is woken"
    assert not store.flush(0.01)
    store.close()
    assert not any(thread.name == "pasture-write-full for one" for thread in threading.enumerate()), "and it ends at once"


def test_a_tier_that_takes_nothing_keeps_its_line_and_no_other_s() -> None:
    shut, open_ = ShelfTier("shut"), ShelfTier("open")
    shut.accepts = False
    store = store_over(shut, open_)
    put(store, TALK)
    wait_for(lambda: len(open_.blocks) == 3)
    assert not store.flush(5), "it says so without waiting for long"
    assert shut.blocks == {}
    shut.accepts = True
    assert store.flush(20)
    assert len(shut.blocks) == 3


def test_a_path_is_asked_about_once_and_read_in_batches() -> None:
    codec = PlainCodec(pad_bytes=1000)
    near, far = ShelfTier("near"), ShelfTier("far", batch_bytes=10**9)
    talk = conversation(6, 64 * 6)
    for tier, wanted in ((near, (0, 3)), (far, range(6))):
        for number, address in enumerate(path_in(codec, talk)):
            if number in wanted:
                slab = slab_of(talk, address.p0, address.p1)
                tier.blocks[address.key] = Block(address, talk[address.p0 : address.p1], Form.RAW, codec.pack(slab))
    store = store_over(near, far)
    ready = threading.Event()
    lift = store.lift(NAME, talk, 0, ready.set)
    assert lift is not None
    assert ready.wait(20)
    assert store.reach(NAME, talk) == len(talk)
    lift.release()
    assert (near.calls("stored"), far.calls("stored")) == (1, 1)
    assert near.batches == [1, 1]
    assert sorted(far.batches) == [2, 2], "neighbours from one tier come together"


def path_in(codec: PlainCodec, tokens: array[int]) -> list[Address]:
    return list(chain(root_key(codec.fingerprint, NAME), tokens))
