"""What nobody uses is dropped when its time has come, and nothing else is."""

from __future__ import annotations

from array import array
from pathlib import Path
from time import monotonic, sleep

import numpy as np

from pasture.core.storage import BlockKey
from pasture.core.values import Form, Namespace
from pasture.tiers.block import Block
from pasture.tiers.disk import DiskTier
from pasture.tiers.expiring import Expiring
from pasture.tiers.keys import root_key
from pasture.tiers.memory import MemoryTier
from pasture.tiers.planning import leading_tokens
from pasture.tiers.trail import Trail, Trails
from tests.tier_support import toks

TRAILS = Trails(b"model")


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def trail(tokens: array[int], name: str = "n") -> Trail:
    return TRAILS.of(Namespace(name), tokens)


def owner(name: str) -> BlockKey:
    return root_key(b"model", Namespace(name))


def blocks(memory: MemoryTier, tokens: array[int], name: str = "n") -> list[Block]:
    missing = memory.missing(trail(tokens, name), 0, len(tokens), use=True)
    return [Block(a, tokens[a.p0 : a.p1], Form.RAW, np.zeros(100, np.uint8), owner=owner(name)) for a in missing]


def conversation(number: int, n_tokens: int = 192) -> array[int]:
    return toks([*range(64), number, *range(n_tokens - 65)])


def test_ram_drops_what_was_not_used_for_so_long() -> None:
    time, memory = Time(), MemoryTier(1 << 20, divisible=True)
    expiring = Expiring(memory, (), 100.0, time)
    used, left, pinned = (conversation(number) for number in range(3))
    for tokens in (used, left, pinned):
        for block in blocks(memory, tokens):
            assert memory.insert(block)
    pin = memory.pin(trail(pinned))
    for time.now in (0.0, 50.0, 99.0):
        assert expiring.round() == 0
    memory.missing(trail(used), 0, len(used), use=True)
    time.now = 100.0
    assert expiring.round() == 2, "the first block is everybody's"
    assert [memory.reach(trail(tokens)) for tokens in (used, left, pinned)] == [192, 64, 192]
    pin.release()
    time.now = 199.0
    expiring.round()
    assert memory.reach(trail(used)) == 192
    time.now = 300.0
    expiring.round()
    assert memory.used_bytes == 0
    memory.check()


def test_owners_may_have_a_time_of_their_own(tmp_path: Path) -> None:
    time, memory = Time(), MemoryTier(1 << 20, divisible=True)
    disk = DiskTier(tmp_path, 1 << 20, now=time)
    expiring = Expiring(memory, (disk,), 100.0, time)
    mine, others = conversation(1), conversation(2)
    for name, tokens in (("mine", mine), ("others", others)):
        for block in blocks(memory, tokens, name):
            assert memory.insert(block)
            assert disk.put(block)

    def left() -> tuple[int, int, int]:
        expiring.round()
        return memory.reach(trail(mine, "mine")), memory.reach(trail(others, "others")), disk.statistics().blocks

    for time.now in (0.0, 15.0, 30.0):
        assert left() == (192, 192, 6)
    expiring.keep_for({owner("mine"): 20.0})
    assert left() == (0, 192, 3), "what was unused for so long before it was said counts"
    expiring.keep_for({})
    time.now = 99.0
    assert left() == (0, 192, 3)
    time.now = 110.0
    assert left() == (0, 0, 0)
    disk.close()


def test_what_is_pinned_in_ram_stays_on_disk(tmp_path: Path) -> None:
    time, memory = Time(), MemoryTier(1 << 20, divisible=True)
    disk = DiskTier(tmp_path, 1 << 20, now=time)
    expiring = Expiring(memory, (disk,), 100.0, time)
    for number in (1, 2):
        for block in blocks(memory, conversation(number)):
            assert memory.insert(block)
            assert disk.put(block)
    assert disk.statistics().blocks == 5
    pin = memory.pin(trail(conversation(1)))
    for time.now in (0.0, 90.0, 180.0, 270.0):
        expiring.round()
    assert disk.statistics().blocks == 3
    pin.release()
    time.now = 400.0
    expiring.round()
    assert disk.statistics().blocks == 0
    disk.close()


def test_who_only_counts_what_the_disk_has_does_not_use_it(tmp_path: Path) -> None:
    time, memory = Time(), MemoryTier(1 << 20, divisible=True)
    disk = DiskTier(tmp_path, 1 << 20, now=time)
    for block in blocks(memory, conversation(1)):
        assert disk.put(block)
    time.now = 90.0
    assert leading_tokens(disk, trail(conversation(1)), divisible=True) == 192
    assert leading_tokens(disk, trail(conversation(2)), divisible=True) == 64
    assert disk.statistics().missed_tokens == 0
    time.now = 101.0
    disk.expire(100.0, {}, ())
    assert disk.statistics().blocks == 0
    disk.close()


def test_nothing_is_dropped_before_it_is_known_who_has_a_time_of_their_own() -> None:
    memory = MemoryTier(1 << 20, divisible=True)
    expiring = Expiring(memory, (), 0.01, monotonic)
    for block in blocks(memory, conversation(1)):
        assert memory.insert(block)
    expiring.start()
    try:
        sleep(2.5)
        assert memory.used_bytes
        expiring.keep_for({})
        deadline = monotonic() + 10.0
        while memory.used_bytes and monotonic() < deadline:
            sleep(0.05)
        assert not memory.used_bytes
    finally:
        assert expiring.stop(10.0)


def test_a_longer_time_of_ones_own_outlives_the_others() -> None:
    time, memory = Time(), MemoryTier(1 << 20, divisible=True)
    expiring = Expiring(memory, (), 100.0, time)
    for block in blocks(memory, conversation(1), "mine"):
        assert memory.insert(block)
    expiring.keep_for({owner("mine"): 300.0})
    for time.now in (0.0, 100.0, 200.0, 299.0):
        assert expiring.round() == 0
    time.now = 301.0
    assert expiring.round() == 3


def test_whoever_says_so_is_heard_at_once() -> None:
    memory = MemoryTier(1 << 20, divisible=True)
    expiring = Expiring(memory, (), 1e6, monotonic)
    for block in blocks(memory, conversation(1)):
        assert memory.insert(block)
    expiring.start()
    try:
        expiring.keep_for({owner("n"): 0.02})
        deadline = monotonic() + 10.0
        while memory.used_bytes and monotonic() < deadline:
            sleep(0.005)
        assert not memory.used_bytes
    finally:
        assert expiring.stop(10.0)


def test_what_waits_to_be_written_stays() -> None:
    time, memory = Time(), MemoryTier(1 << 20, divisible=True, n_writers=1)
    expiring = Expiring(memory, (), 100.0, time)
    for block in blocks(memory, conversation(1)):
        memory.insert(block)
    expiring.round()
    time.now = 500.0
    assert expiring.round() == 0


def test_what_came_ahead_has_as_long_as_what_was_used() -> None:
    time, memory = Time(), MemoryTier(1 << 20, divisible=True)
    expiring = Expiring(memory, (), 100.0, time)
    for time.now in (0.0, 50.0, 100.0):
        expiring.round()
    time.now = 150.0
    for block in blocks(memory, conversation(1)):
        assert memory.insert_ahead(block)
    for time.now in (200.0, 249.0):
        assert expiring.round() == 0, "it came a while ago, on a server on which nothing else happens"
    time.now = 350.0
    assert expiring.round() == 3
    assert memory.aheads.unused_bytes == 0


def test_the_disk_drops_it_too(tmp_path: Path) -> None:
    time, memory = Time(), MemoryTier(1 << 20, divisible=True)
    disk = DiskTier(tmp_path, 1 << 20, now=time)
    expiring = Expiring(memory, (disk,), 100.0, time)
    for block in blocks(memory, conversation(1)):
        assert disk.put(block)
    time.now = 99.0
    expiring.round()
    assert disk.statistics().blocks == 3
    time.now = 201.0
    expiring.round()
    assert disk.statistics().blocks == 0
    assert not list(tmp_path.rglob("*.kv"))
    disk.close()
