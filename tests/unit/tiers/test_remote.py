"""The remote tier over stores that do as they are told: what is found, what is bounded, what is left alone."""

from __future__ import annotations

import logging
import threading
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pasture.core.values import Form, Namespace
from pasture.tiers.gate import OpenGate
from pasture.tiers.keys import chain, root_key
from pasture.tiers.memory import MemoryTier
from pasture.tiers.ports import SlowTier
from pasture.tiers.remote_calls import Calls, TooLate
from pasture.tiers.remote_mooncake import MooncakeShelf
from pasture.tiers.remote_ports import CHILDREN, Shelf
from pasture.tiers.remote_server import Server
from pasture.tiers.sealed import SealedWire
from pasture.tiers.store import TieredStore
from tests import tier_support
from tests.blocks import block_at, blocks, conversation, leading, path, root, same
from tests.remote_support import DictShelf, Fleet, connected, states, wait_for
from tests.tier_support import NAME, PlainCodec, ShelfTier, cells_of, put, slab_of

TALK = conversation(1, 200)


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    fleet = Fleet()
    yield fleet
    fleet.close()


def test_what_is_put_is_found_by_another(fleet: Fleet) -> None:
    shelf = DictShelf()
    writer, reader = connected(fleet.tier(shelf)), connected(fleet.tier(shelf))
    expected = list(blocks(TALK))
    assert all(writer.put(block) for block in expected)
    shelf.calls.clear()
    assert leading(reader, path(TALK)) == 4
    assert shelf.calls.count("stored") == 1, "one question for the whole path"
    found = reader.get_batch(path(TALK), 5.0)
    assert shelf.calls.count("read") == 1, "one read for all of them"
    assert all(map(same, found, expected))
    statistics = reader.statistics()
    assert (statistics.hit_tokens, statistics.missed_tokens) == (200, 0)
    assert statistics.read_bytes == sum(map(len, shelf.objects.values())) == writer.statistics().written_bytes


def test_a_block_is_written_once(fleet: Fleet) -> None:
    shelf = DictShelf()
    tier = connected(fleet.tier(shelf))
    [block] = blocks(TALK[:64])
    assert tier.put(block)
    assert tier.put(block)
    assert shelf.calls.count("write") == 1


def test_a_short_end_is_found_behind_its_parent(fleet: Fleet) -> None:
    for list_all in (True, False):
        shelf = DictShelf()
        tier = connected(fleet.tier(shelf, list_all=list_all))
        for block in blocks(TALK):
            tier.put(block)
        longer = path(TALK + conversation(2, 100))
        assert leading(tier, longer) == 3, "no full block of the longer prompt is there"
        behind, nothing = tier.following([longer[3].parent, root_key(b"another", Namespace("x"))])
        assert behind == [(path(TALK)[3], TALK[192:])]
        assert nothing == []
        assert bool(tier.following([root()])[0]) is list_all, "of full blocks only where that is cheap"


def test_a_few_are_offered_and_none_that_is_gone(fleet: Fleet) -> None:
    shelf = DictShelf()
    tier = connected(fleet.tier(shelf))
    for length in range(1, 2 + CHILDREN):
        tail = TALK[:64] + conversation(100 + length, length)
        tier.put(block_at(path(tail)[1], tail))
    [found] = tier.following([path(TALK)[0].key])
    assert len(found) == CHILDREN
    tier.remove(found[0][0].key)
    assert found[0] not in tier.following([path(TALK)[0].key])[0]


def test_what_leads_up_to_a_path_is_kept_in_use(fleet: Fleet) -> None:
    shelf = DictShelf()
    tier = connected(fleet.tier(shelf))
    addresses = path(TALK)
    assert tier.stored(addresses[2:], addresses[:2]) == [False, False]
    assert set(shelf.used) == {address.key for address in addresses}


def test_a_damaged_block_is_a_miss_and_is_dropped(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    shelf = DictShelf()
    tier = connected(fleet.tier(shelf))
    expected = list(blocks(TALK))
    for block in expected:
        tier.put(block)
    names = [address.key for address in path(TALK)]
    shelf.objects[names[0]] = shelf.objects[names[0]][:-1] + b"?"
    shelf.objects[names[1]] = shelf.objects[names[2]]
    shelf.objects[names[2]] = b"short"
    found = tier.get_batch(path(TALK), 5.0)
    assert found[:3] == [None, None, None]
    assert same(found[3], expected[3])
    assert tier.statistics().damaged_blocks == 3
    assert set(shelf.objects) == {names[3]}
    assert len([record for record in caplog.records if "damaged" in record.message]) == 1


def test_another_model_and_another_tenant_find_nothing(fleet: Fleet) -> None:
    shelf = DictShelf()
    tier = connected(fleet.tier(shelf))
    for block in blocks(TALK):
        tier.put(block)
    for other in (root_key(b"another model", Namespace("default")), root("another tenant")):
        foreign = list(chain(other, TALK))
        assert not any(tier.stored(foreign))
        assert tier.following([other]) == [[]]
        assert tier.get_batch(foreign, 5.0) == [None] * 4


def test_sealed_blocks_tell_nothing_and_open_under_their_key_alone(fleet: Fleet) -> None:
    shelf = DictShelf()
    tier = connected(fleet.tier(shelf, wire=SealedWire(b"k" * 32)))
    expected = list(blocks(TALK))
    for block in expected:
        tier.put(block)
    heads = [head for each in shelf.lists.values() for head in each]
    everything = b"".join([*shelf.objects, *shelf.objects.values(), *shelf.lists, *heads])
    for block in expected:
        assert bytes(block.address.key) not in everything
        assert block.payload.tobytes()[:64] not in everything
        assert block.tokens.tobytes()[:32] not in everything
    assert all(map(same, tier.get_batch(path(TALK), 5.0), expected))
    assert tier.following([path(TALK)[2].key])[0] == [(path(TALK)[3], TALK[192:])]
    remote = tier.statistics().remote
    assert remote is not None
    assert remote.sealed
    for wire in (None, SealedWire(b"q" * 32)):
        other = connected(fleet.tier(shelf, wire=wire))
        assert not any(other.stored(path(TALK)))
        assert other.following([path(TALK)[2].key]) == [[]]


# Trouble


def test_a_store_that_hangs_is_asked_twice_and_then_left_alone(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    shelf = DictShelf()
    tier = connected(fleet.tier(shelf, lookup_seconds=0.2))
    for block in blocks(TALK):
        tier.put(block)
    shelf.open_door.clear()
    for _ in range(3):
        assert not any(tier.stored(path(TALK))), "it comes back while the store still hangs"
    assert states(tier) != ["closed"]
    n_calls = len(shelf.calls)
    assert n_calls <= 20
    for _ in range(20):
        assert not any(tier.stored(path(TALK)))
        assert tier.get_batch(path(TALK), 5.0) == [None] * 4
        assert tier.following([root()]) == [[]]
        assert not tier.accepts
    assert "stored" not in shelf.calls[n_calls:]
    assert tier.statistics().missed_tokens > 200
    shelf.open_door.set()
    connected(tier)
    assert leading(tier, path(TALK)) == 4
    remote = tier.statistics().remote
    assert remote is not None
    assert remote.servers[0].openings == 1
    assert len([record for record in caplog.records if "left alone" in record.message]) == 1


def test_a_store_that_refuses_is_left_alone_at_once_and_probed_until_it_is_back(fleet: Fleet) -> None:
    shelf = DictShelf()
    tier = connected(fleet.tier(shelf))
    [block] = blocks(TALK[:64])
    tier.put(block)
    shelf.broken = True
    assert not any(tier.stored(path(TALK)))
    assert states(tier) != ["closed"]
    assert not tier.put(block)
    shelf.broken = False
    connected(tier)
    assert leading(tier, path(TALK)) == 1


def test_a_store_that_is_not_there_at_the_start_is_found_later(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    shelf = DictShelf()
    shelf.broken = True
    tier = fleet.tier(shelf)
    wait_for(lambda: any("cannot be reached" in record.message for record in caplog.records))
    assert not tier.accepts
    assert not any(tier.stored(path(TALK)))
    shelf.broken = False
    assert all(map(connected(tier).put, blocks(TALK)))


def test_a_read_that_hangs_takes_no_longer_than_it_may(fleet: Fleet) -> None:
    shelf = DictShelf()
    tier = connected(fleet.tier(shelf))
    for block in blocks(TALK):
        tier.put(block)
    shelf.open_door.clear()
    assert tier.get_batch(path(TALK), 0.05) == [None] * 4
    shelf.open_door.set()
    connected(tier)
    assert None not in tier.get_batch(path(TALK), 5.0)


def test_a_full_store_is_read_and_not_written(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    shelf = DictShelf()
    tier = connected(fleet.tier(shelf))
    first, *rest = blocks(TALK)
    tier.put(first)
    shelf.full = True
    assert not tier.put(rest[0])
    assert not tier.accepts
    assert states(tier) == ["closed"]
    assert same(tier.get_batch([first.address], 5.0)[0], first)
    assert any("no room" in record.message for record in caplog.records)
    shelf.full = False
    wait_for(lambda: tier.accepts)
    assert tier.put(rest[0])


def test_a_store_that_hangs_does_not_keep_the_tier_from_closing(fleet: Fleet) -> None:
    shelf = DictShelf()
    tier = connected(fleet.tier(shelf, lookup_seconds=0.1))
    shelf.open_door.clear()
    tier.close()
    assert not shelf.closed
    shelf.open_door.set()


def test_a_store_is_closed_when_the_last_call_has_come_back() -> None:
    shelf, slow, order = DictShelf(), threading.Event(), list[str]()
    server = Server(shelf, lookup_seconds=5.0)
    wait_for(lambda: server.answers)
    started = threading.Event()

    def read(_: Shelf) -> bool:
        started.set()
        slow.wait(20)
        order.append("closed before" if shelf.closed else "read")
        return True

    server.ask(read)
    assert started.wait(20)
    closing = threading.Thread(target=server.close, args=(20.0,))
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    slow.set()
    closing.join(20)
    assert order == ["read"]
    assert shelf.closed


def test_a_store_with_a_call_that_does_not_come_back_is_not_closed() -> None:
    shelf, never = DictShelf(), threading.Event()
    server = Server(shelf, lookup_seconds=5.0)
    wait_for(lambda: server.answers)
    server.ask(lambda _: never.wait(20))
    server.close(0.3)
    never.set()
    assert server.answers
    assert not shelf.closed


def test_warnings_are_said_and_shown(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    shelf = DictShelf()
    shelf.warnings = ("it is slower than you asked for",)
    remote = connected(fleet.tier(shelf)).statistics().remote
    assert remote is not None
    assert remote.warnings == shelf.warnings
    assert any("slower than you asked for" in record.message for record in caplog.records if record.levelno >= logging.WARNING)


# Several servers


def test_a_ring_spreads_blocks_and_survives_a_server_with_replicas(fleet: Fleet) -> None:
    shelves = [DictShelf(f"shelf:{number}") for number in range(3)]
    tier = connected(fleet.tier(*shelves, replicas=2))
    talk = conversation(3, 64 * 60)
    expected = list(blocks(talk, 10))
    assert all(map(tier.put, expected))
    assert sum(len(shelf.objects) for shelf in shelves) == 120
    assert all(len(shelf.objects) >= 20 for shelf in shelves), "about a third each"
    shelves[1].broken = True
    tier.stored(path(talk))
    wait_for(lambda: states(tier)[1] != "closed")
    assert leading(tier, path(talk)) == 60
    assert all(map(same, tier.get_batch(path(talk), 5.0), expected))
    assert tier.accepts


def test_a_server_that_came_back_empty_is_made_up_for_by_its_replica(fleet: Fleet) -> None:
    shelves = [DictShelf(f"shelf:{number}") for number in range(2)]
    tier = connected(fleet.tier(*shelves, replicas=2))
    expected = list(blocks(TALK))
    assert all(map(tier.put, expected))
    shelves[0].objects.clear()
    assert leading(tier, path(TALK)) == 4
    assert all(map(same, tier.get_batch(path(TALK), 5.0), expected))


def test_one_more_server_moves_its_share_of_the_names(fleet: Fleet) -> None:
    shelves = [DictShelf(f"10.0.0.{number}:6379") for number in range(1, 6)]
    four, five = connected(fleet.tier(*shelves[:4]))._ring, connected(fleet.tier(*shelves))._ring
    reversed_four = connected(fleet.tier(*reversed(shelves[:4])))._ring
    names = [address.key for address in path(conversation(4, 64 * 2000))]
    before = [four.of(name)[0].address for name in names]
    assert before == [reversed_four.of(name)[0].address for name in names], "in whatever order they are written"
    moved = sum(old != five.of(name)[0].address for old, name in zip(before, names, strict=True))
    assert moved <= 1.5 * len(names) / 5


# In the store


def store_over(*tiers: SlowTier, fingerprint: bytes = b"plain") -> TieredStore:
    memory = MemoryTier(1 << 30, n_writers=len(tiers))
    store = TieredStore(PlainCodec(fingerprint), memory, OpenGate(), slow=tiers)
    tier_support.OPENED.append(store)
    return store


def lifted(store: TieredStore, tokens: array[int]) -> int:
    """How far RAM reaches after a lift."""
    ready = threading.Event()
    lift = store.lift(NAME, tokens, store.reach(NAME, tokens), ready.set)
    assert lift is not None
    assert ready.wait(20)
    reach = store.reach(NAME, tokens)
    lift.release()
    return reach


def test_what_one_store_puts_another_lifts_and_keeps_on_its_disk(fleet: Fleet) -> None:
    shelf, disk = DictShelf(), ShelfTier("disk")
    one = store_over(connected(fleet.tier(shelf)))
    put(one, TALK)
    assert one.flush(20)
    remote = connected(fleet.tier(shelf))
    other = store_over(disk, remote)
    longer = TALK + conversation(5, 30)
    assert lifted(other, longer) == 200, "the short end too"
    assert cells_of(other.take(NAME, longer, 0, 200)) == list(slab_of(TALK, 0, 200).cells)
    assert other.flush(20)
    assert len(disk.blocks) == 4, "found on the network, kept on the disk as usual"
    assert remote.statistics().written_bytes == 0, "and not sent back"


def test_a_store_of_another_model_lifts_nothing(fleet: Fleet) -> None:
    shelf = DictShelf()
    one = store_over(connected(fleet.tier(shelf)))
    put(one, TALK)
    assert one.flush(20)
    other = store_over(connected(fleet.tier(shelf)), fingerprint=b"another model")
    assert lifted(other, TALK) == 0


def test_what_could_not_be_written_while_the_store_was_away_is_written_later(fleet: Fleet) -> None:
    shelf = DictShelf()
    remote = connected(fleet.tier(shelf))
    store = store_over(remote)
    shelf.broken = True
    put(store, TALK)
    wait_for(lambda: states(remote) != ["closed"])
    assert not store.flush(0.05), "it says so"
    shelf.broken = False
    connected(remote)
    assert store.flush(20)
    assert len(shelf.objects) == 4


def test_a_hanging_network_does_not_keep_blocks_from_the_disk(fleet: Fleet) -> None:
    shelf, disk = DictShelf(), ShelfTier("disk")
    store = store_over(disk, connected(fleet.tier(shelf)))
    shelf.open_door.clear()
    put(store, TALK)
    wait_for(lambda: len(disk.blocks) == 4)
    shelf.open_door.set()
    assert store.flush(20)


def test_a_longer_end_takes_the_shorter_ones_place(fleet: Fleet) -> None:
    shelf = DictShelf()
    store = store_over(connected(fleet.tier(shelf)))
    put(store, TALK)
    assert store.flush(20)
    longer = TALK + conversation(6, 20)
    put(store, longer, 192)
    assert store.flush(20)
    assert path(TALK)[3].key not in shelf.objects
    assert len(shelf.objects) == 4


def test_blocks_in_other_forms_travel_too(fleet: Fleet) -> None:
    tier = connected(fleet.tier(DictShelf()))
    [block] = blocks(TALK[:64])
    packed = replace(block, form=Form.Q8_0)
    tier.put(packed)
    assert same(tier.get_batch([block.address], 5.0)[0], packed)


# Calls


def test_a_call_that_nobody_waits_for_is_not_begun_and_threads_are_few() -> None:
    shelf = DictShelf()
    shelf.open_door.clear()
    calls = Calls("test", max_threads=2)
    hanging = [calls.start(shelf.ping) for _ in range(5)]
    wait_for(lambda: len(shelf.calls) == 2)
    for pending in hanging:
        with pytest.raises(TooLate):
            pending.result()
    assert calls.n_threads == 2
    shelf.open_door.set()
    answer = calls.start(lambda: 7)
    assert answer.wait(20)
    assert answer.result() == 7
    assert len(shelf.calls) == 2, "the three that were given up were not begun"
    assert calls.close(20.0)
    assert calls.n_threads == 0


def test_what_a_call_raises_arrives_where_it_is_waited_for() -> None:
    calls = Calls("test")

    def fail() -> None:
        raise ValueError("so")

    pending = calls.start(fail)
    assert pending.wait(20)
    with pytest.raises(ValueError, match="so"):
        pending.result()
    assert calls.close(20.0)


# RDMA


def test_rdma_without_hardware_is_tcp_and_says_so(tmp_path: Path) -> None:
    def pool(device: str, devices: Path) -> MooncakeShelf:
        return MooncakeShelf(("m", 1), protocol="rdma", device=device, share_bytes=1 << 20, host=None, devices=devices)

    none = pool("", tmp_path / "infiniband")
    assert none.transport == "tcp"
    assert none.warnings == ("RDMA was asked for, but this machine has no RDMA device: blocks go over TCP",)
    (tmp_path / "infiniband" / "mlx5_0").mkdir(parents=True)
    wrong = pool("mlx5_7", tmp_path / "infiniband")
    assert wrong.transport == "tcp"
    assert "mlx5_7 is none of this machine's RDMA devices (mlx5_0)" in wrong.warnings[0]
    for right in (pool("", tmp_path / "infiniband"), pool("mlx5_0", tmp_path / "infiniband")):
        assert (right.transport, right.warnings) == ("rdma", ())
