"""What is on whose account in RAM and on disk: limits, guaranteed shares, and accounts that survive everything."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from pasture.core.shares import BY_WEIGHT, LATELY_SECONDS, Shares
from pasture.core.storage import BlockKey
from pasture.core.values import Allowance, Form, Namespace
from pasture.foresight.policies import POLICIES
from pasture.tiers.block import Block
from pasture.tiers.disk import DiskTier
from pasture.tiers.entries import Entry, size_of
from pasture.tiers.eviction import Ordered, Wanted
from pasture.tiers.memory import MemoryTier
from pasture.tiers.owners import Owners
from pasture.tiers.sealed import SealedWire
from pasture.tiers.trail import Trail
from pasture.tiers.wire import PlainWire, Wire
from tests.blocks import FINGERPRINT, block_at, blocks, conversation, leading, path, root

SIZE = size_of(next(blocks(conversation(0, 64))))
QUIET, GREEDY = root("quiet"), root("greedy")


class Time:
    def __init__(self) -> None:
        self.seconds = 1_000_000.0

    def __call__(self) -> float:
        return self.seconds


# Shares


def test_what_is_guaranteed_is_by_weight_or_by_name_and_never_more_than_there_is() -> None:
    shares: Shares[str] = Shares(lambda allowance: allowance.ram_bytes, Time())
    shares.allow("a", Allowance(weight=3.0))
    shares.allow("b", Allowance())
    assert (shares.guaranteed("a", 800), shares.guaranteed("b", 800)) == (300, 100)
    assert shares.guaranteed("nobody", 800) == 0
    shares.allow("c", Allowance(guaranteed_share=0.5))
    assert [shares.guaranteed(name, 800) for name in "abc"] == [150, 50, 400]
    shares.allow("d", Allowance(guaranteed_share=0.75))
    assert sum(shares.guaranteed(name, 1000) for name in "abcd") <= 1000
    assert shares.guaranteed("d", 1000) == 600


def test_who_has_not_asked_for_long_has_no_guarantee_and_no_limit_is_kept_for_him() -> None:
    clock = Time()
    shares: Shares[str] = Shares(lambda allowance: allowance.ram_bytes, clock)
    shares.allow("a", Allowance(ram_bytes=5))
    assert shares.limited
    clock.seconds += LATELY_SECONDS - 1
    shares.allow("b", Allowance())
    clock.seconds += 20
    assert shares.guaranteed("a", 100) == 0
    assert shares.guaranteed("b", 100) == BY_WEIGHT * 100
    assert not shares.limited


# RAM


def insert(memory: MemoryTier, seed: int, namespace: str, n_tokens: int = 128) -> int:
    return sum(memory.insert(block) for block in blocks(conversation(seed, n_tokens), namespace=namespace))


def reach(memory: MemoryTier, seed: int, namespace: str, n_tokens: int = 128) -> int:
    return memory.reach(Trail(Namespace(namespace), FINGERPRINT, conversation(seed, n_tokens)))


def test_an_owner_at_its_limit_evicts_its_own_coldest_blocks() -> None:
    memory = MemoryTier(100 * SIZE)
    memory.allow(GREEDY, Allowance(ram_bytes=4 * SIZE))
    insert(memory, 100, "quiet")
    for seed in range(5):
        insert(memory, seed, "greedy")
        memory.check()
    assert memory.used_bytes == 6 * SIZE
    assert [reach(memory, seed, "greedy") for seed in range(5)] == [0, 0, 0, 128, 128]
    assert reach(memory, 100, "quiet") == 128


def test_equal_blocks_count_once() -> None:
    memory = MemoryTier(100 * SIZE)
    memory.allow(GREEDY, Allowance(ram_bytes=2 * SIZE))
    for _ in range(3):
        insert(memory, 1, "greedy")
    assert reach(memory, 1, "greedy") == 128


def test_a_lower_limit_is_kept_at_once_but_for_what_is_pinned() -> None:
    memory = MemoryTier(100 * SIZE)
    for seed in range(4):
        insert(memory, seed, "greedy")
    pin = memory.pin(Trail(Namespace("greedy"), FINGERPRINT, conversation(0, 128)))
    memory.allow(GREEDY, Allowance(ram_bytes=SIZE))
    assert memory.used_bytes == 2 * SIZE
    assert insert(memory, 9, "greedy") == 0
    pin.release()
    assert memory.used_bytes == SIZE
    memory.check()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_flood_does_not_push_what_another_is_guaranteed_out_of_ram(policy: str) -> None:
    clock = Time()
    memory = MemoryTier(20 * SIZE, policy=POLICIES[policy](clock))
    memory.allow(QUIET, Allowance())
    memory.allow(GREEDY, Allowance())
    hot = Trail(Namespace("quiet"), FINGERPRINT, conversation(100, 256))
    memory.arrived(hot)
    insert(memory, 100, "quiet", 256)
    for seed in range(60):
        clock.seconds += 1
        memory.arrived(Trail(Namespace("greedy"), FINGERPRINT, conversation(seed, 128)))
        insert(memory, seed, "greedy")
    assert memory.reach(hot) == 256
    assert memory.used_bytes <= 20 * SIZE
    memory.check()


def test_without_a_guarantee_the_same_flood_does() -> None:
    memory = MemoryTier(20 * SIZE)
    memory.allow(QUIET, Allowance(guaranteed_share=0.0))
    memory.allow(GREEDY, Allowance())
    insert(memory, 100, "quiet", 256)
    for seed in range(60):
        insert(memory, seed, "greedy")
    assert reach(memory, 100, "quiet", 256) == 0


def test_beyond_what_is_guaranteed_the_least_lately_used_goes_whoever_it_is() -> None:
    memory = MemoryTier(12 * SIZE)
    memory.allow(QUIET, Allowance())
    memory.allow(GREEDY, Allowance())
    for seed in range(100, 104):
        insert(memory, seed, "quiet")
    for seed in range(6):
        insert(memory, seed, "greedy")
    assert sum(reach(memory, seed, "quiet") for seed in range(100, 104)) == 3 * 64, "a quarter of twelve"
    assert sum(reach(memory, seed, "greedy") for seed in range(6)) == 9 * 64


def test_a_block_on_nobodys_account_has_a_place_and_no_guarantee() -> None:
    memory = MemoryTier(4 * SIZE)
    tokens = conversation(1, 128)
    for address in path(tokens):
        assert memory.insert(block_at(address, tokens))
    memory.allow(QUIET, Allowance())
    insert(memory, 2, "quiet", 256)
    assert memory.reach(Trail(Namespace("default"), FINGERPRINT, tokens)) < 128
    memory.check()


class Asked(Ordered):
    """A policy that counts what it is asked."""

    def __init__(self, wanted: Wanted) -> None:
        super().__init__(lambda entry: (entry.last_used,), wanted)
        self.n_asked = 0

    def expects(self, key: BlockKey) -> float:
        self.n_asked += 1
        return 1.0


def test_of_a_conversation_only_the_policy_of_its_owner_is_asked() -> None:
    made: list[Asked] = []

    def make(wanted: Wanted) -> Asked:
        made.append(Asked(wanted))
        return made[-1]

    memory = MemoryTier(100 * SIZE, policy=make)
    for number in range(20):
        insert(memory, number, f"tenant {number}")
    trails = [Trail(Namespace("tenant 3"), FINGERPRINT, conversation(seed, 128)) for seed in (3, 300, 301)]
    assert memory.expected(trails) == [0.0, 1.0, 1.0], "what is here already is not expected"
    assert sum(policy.n_asked for policy in made) == 2


def test_the_policy_of_an_owner_that_has_nothing_and_asks_for_nothing_is_forgotten() -> None:
    clock = Time()
    block = next(blocks(conversation(0, 64), namespace="holder"))
    entry = Entry(block)
    owners = Owners(POLICIES["s3fifo"](clock), lambda entry: not entry.gone, clock)
    owners.shares.allow(QUIET, Allowance())
    owners.arrived(QUIET, [])
    owners.entered(entry)
    for number in range(50):
        owners.arrived(root(f"passer-by {number}"), [])
    assert set(owners._policies) == {None, QUIET, root("holder"), root("passer-by 49")}
    owners.removed(entry)
    clock.seconds += LATELY_SECONDS
    owners.shares.allow(GREEDY, Allowance())
    owners.arrived(GREEDY, [])
    assert set(owners._policies) == {None, GREEDY}


# Disk


Open = Callable[..., DiskTier]


@pytest.fixture(params=["plain", "sealed"])
def wire(request: pytest.FixtureRequest) -> Wire:
    return PlainWire() if request.param == "plain" else SealedWire(bytes(range(32)))


@pytest.fixture
def clock() -> Time:
    return Time()


@pytest.fixture
def open_tier(tmp_path: Path, clock: Time, wire: Wire) -> Iterator[Open]:
    with ExitStack() as opened:
        yield lambda budget: opened.enter_context(closing(DiskTier(tmp_path, budget, wire=wire, clock=clock, now=clock)))


def put(tier: DiskTier, seed: int, namespace: str, clock: Time, n_tokens: int = 128) -> None:
    for block in blocks(conversation(seed, n_tokens), namespace=namespace):
        tier.put(block)
    clock.seconds += 10


def kept(tier: DiskTier, seed: int, namespace: str, n_tokens: int = 128) -> int:
    return leading(tier, path(conversation(seed, n_tokens), namespace))


def file_bytes(wire: Wire) -> int:
    head, payload = wire.encode(next(blocks(conversation(0, 64))))
    return len(head) + payload.nbytes


def test_on_disk_an_owner_at_its_limit_evicts_its_own(open_tier: Open, wire: Wire, clock: Time) -> None:
    tier, size = open_tier(1 << 20), file_bytes(wire)
    tier.allow(GREEDY, Allowance(disk_bytes=4 * size))
    put(tier, 100, "quiet", clock)
    for seed in range(5):
        put(tier, seed, "greedy", clock)
    assert tier.bytes_by_owner()[wire.name(GREEDY)] <= 4 * size
    assert kept(tier, 4, "greedy") == 2
    assert kept(tier, 0, "greedy") == 0
    assert kept(tier, 100, "quiet") == 2


def test_a_flood_does_not_push_what_another_is_guaranteed_off_the_disk(open_tier: Open, wire: Wire, clock: Time) -> None:
    tier, size = open_tier(20 * file_bytes(wire)), file_bytes(wire)
    tier.allow(QUIET, Allowance())
    tier.allow(GREEDY, Allowance())
    put(tier, 100, "quiet", clock, 256)
    for seed in range(40):
        put(tier, seed, "greedy", clock)
    assert kept(tier, 100, "quiet", 256) == 4
    assert tier.statistics().bytes <= 20 * size


@pytest.mark.parametrize("index", ["kept", "lost"])
def test_accounts_survive_a_restart_and_the_loss_of_the_index(
    open_tier: Open, wire: Wire, clock: Time, tmp_path: Path, index: str
) -> None:
    tier, size = open_tier(20 * file_bytes(wire)), file_bytes(wire)
    put(tier, 100, "quiet", clock, 256)
    whole = conversation(300, 100)
    tier.put(block_at(path(whole, "quiet")[1], whole, whole=True, owner=QUIET))  # nothing leads to a checkpoint
    for seed in range(4):
        put(tier, seed, "greedy", clock)
    before = dict(tier.bytes_by_owner())
    assert before[wire.name(GREEDY)] == 8 * size
    assert before[wire.name(QUIET)] > 4 * size
    tier.close()
    if index == "lost":
        for file in tmp_path.rglob("index*"):
            file.unlink()
    tier = open_tier(20 * size)
    assert tier.bytes_by_owner() == before
    for seed in range(10, 40):  # nobody has asked for anything since: what was there is not the first to go
        put(tier, seed, "greedy", clock)
    assert kept(tier, 100, "quiet", 256) == 4


def test_what_goes_to_disk_and_comes_back_is_on_the_same_account(open_tier: Open, clock: Time) -> None:
    tier = open_tier(1 << 20)
    put(tier, 1, "greedy", clock, 64)
    block = tier.get(path(conversation(1, 64), "greedy")[0])
    assert block is not None
    assert block.owner == GREEDY
    memory = MemoryTier(100 * SIZE)
    memory.allow(GREEDY, Allowance(ram_bytes=10))
    memory.insert_pinned(block).release()
    assert memory.used_bytes == 0


def test_a_squeezed_block_costs_its_owner_less() -> None:
    memory = MemoryTier(100 * SIZE, squeeze_stages=1)
    memory.allow(GREEDY, Allowance(ram_bytes=2 * SIZE))
    insert(memory, 1, "greedy")
    found = memory.next_to_squeeze()
    assert found is not None
    before, _ = found
    smaller = Block(before.address, before.tokens, Form.Q8_0, before.payload[:500], owner=before.owner)
    assert memory.replace(before, smaller, 1)
    memory.check()
    tokens: array[int] = conversation(2, 64)
    tiny = block_at(path(tokens, "greedy")[0], tokens, 400, owner=GREEDY)
    memory.insert(tiny)
    memory.check()
