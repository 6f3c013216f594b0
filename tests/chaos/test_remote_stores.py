"""Real stores on loopback, killed, frozen, filled, emptied and cut off: a miss within its time, and back within seconds.

Each disaster runs against a Redis and against a Mooncake pool. What is asserted is what a request sees: nothing raised, nothing
wrong, nothing waited for that could have been given up; and that blocks are found again once the store is there.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pasture.config.remote import parse_remote
from pasture.stores import open_remote
from pasture.tiers import remote_mooncake
from pasture.tiers.remote import RemoteTier
from pasture.tiers.remote_mooncake import MooncakeShelf
from pasture.tiers.remote_ports import Shelf
from pasture.tiers.remote_redis import redis_shelf
from tests.blocks import blocks, conversation, leading, path, same
from tests.remote_support import (
    LOOPBACK,
    Cable,
    Fleet,
    Process,
    connected,
    free_port,
    mooncake_master,
    shelf_in_mooncake,
    shelf_in_redis,
    states,
    wait_for,
)

TALK = conversation(1, 64 * 8 + 20)
BLOCK_BYTES = 200_000
LOOKUP_SECONDS = 0.25
"""more than the product's 50 ms, because the machine that runs tests is busy"""
RECOVERY_SECONDS = 10.0


class World:
    """A store and a tier that uses it."""

    def __init__(self, process: Process, shelf: Callable[[int], Shelf], fleet: Fleet) -> None:
        self.process = process
        self.fleet = fleet
        self._shelf = shelf
        self.tier = connected(self.another())
        self.blocks = list(blocks(TALK, BLOCK_BYTES))

    def another(self) -> RemoteTier:
        """A tier as another server would have it."""
        return self.fleet.tier(self._shelf(self.process.port), lookup_seconds=LOOKUP_SECONDS)

    def fill(self) -> None:
        assert all(map(self.tier.put, self.blocks))

    def is_whole(self) -> bool:
        return leading(self.tier, path(TALK)) == len(self.blocks) and all(
            map(same, self.tier.get_batch(path(TALK), 5.0), self.blocks)
        )

    def is_away(self) -> None:
        """Every question is a miss; once that has been noticed, nobody waits."""
        for _ in range(3):
            assert not any(self.tier.stored(path(TALK)))
        wait_for(lambda: states(self.tier) != ["closed"], "noticing")
        assert not any(self.tier.stored(path(TALK)))
        assert self.tier.get_batch(path(TALK), 5.0) == [None] * len(self.blocks)
        assert not self.tier.put(self.blocks[0])

    def recovers(self) -> None:
        """Within the time that it is promised in."""
        started = time.monotonic()
        connected(self.tier)
        assert time.monotonic() - started < RECOVERY_SECONDS


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    fleet = Fleet()
    yield fleet
    fleet.close()


@pytest.fixture(params=["redis", "mooncake"])
def world(request: pytest.FixtureRequest, fleet: Fleet) -> World:
    if request.param == "redis":
        return World(fleet.redis(), shelf_in_redis, fleet)
    return World(fleet.mooncake(), shelf_in_mooncake, fleet)


def test_another_server_finds_what_one_has_put(world: World) -> None:
    world.fill()
    other = connected(world.another())
    assert leading(other, path(TALK)) == len(world.blocks)
    assert all(map(same, other.get_batch(path(TALK), 5.0), world.blocks))
    [behind] = other.following([path(TALK)[-1].parent])
    assert (path(TALK)[-1], TALK[-20:]) in behind
    other.remove(path(TALK)[0].key)
    assert leading(world.tier, path(TALK)) == 0


def test_a_killed_store_that_comes_back_empty(world: World) -> None:
    world.fill()
    world.process.kill()
    world.is_away()
    world.process.start()
    world.recovers()
    wait_for(lambda: not any(world.tier.stored(path(TALK))), "forgetting")
    wait_for(lambda: all(map(world.tier.put, world.blocks)), "taking blocks again")
    wait_for(world.is_whole, "having them again")


def test_a_frozen_store_thaws(world: World) -> None:
    world.fill()
    world.process.freeze()
    world.is_away()
    world.process.thaw()
    world.recovers()
    wait_for(world.is_whole, "having everything it had")


def test_a_store_frozen_while_it_is_read_is_given_up(world: World) -> None:
    world.fill()
    assert world.is_whole()
    world.process.freeze()
    assert world.tier.get_batch(path(TALK), 0.2) == [None] * len(world.blocks), "while it is still frozen"
    world.process.thaw()
    world.recovers()
    wait_for(world.is_whole)


def test_a_store_that_never_was_there_holds_nobody_up(fleet: Fleet) -> None:
    port = free_port()
    for shelf in (shelf_in_redis(port), shelf_in_mooncake(port)):
        tier = fleet.tier(shelf)
        assert not any(tier.stored(path(TALK)))
        assert not tier.accepts


@pytest.mark.parametrize("kind", ["redis", "mooncake"])
def test_a_full_store_takes_no_more_and_gives_what_it_has(kind: str, fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    if kind == "redis":
        process = fleet.redis("--maxmemory", "4mb", "--maxmemory-policy", "noeviction")
        tier = connected(fleet.tier(shelf_in_redis(process.port)))
    else:
        tier = connected(fleet.tier(shelf_in_mooncake(fleet.mooncake().port, share_bytes=16 << 20)))
    many = list(blocks(conversation(9, 64 * 40), 1_000_000))
    taken = [block for block in many if tier.put(block)]
    assert 0 < len(taken) < len(many)
    assert states(tier) == ["closed"]
    assert any("no room" in record.message for record in caplog.records)
    found = tier.get_batch([block.address for block in taken[-2:]], 5.0)
    assert all(block is None or same(block, expected) for block, expected in zip(found, taken[-2:], strict=True))


def test_blocks_in_redis_expire(fleet: Fleet) -> None:
    tier = connected(fleet.tier(shelf_in_redis(fleet.redis().port, ttl_seconds=0.5)))
    assert all(map(tier.put, blocks(TALK, 1000)))
    wait_for(lambda: not any(tier.stored(path(TALK))), "expiring")


# A list of plain servers


def test_two_of_three_plain_servers_go_on_alone(fleet: Fleet) -> None:
    processes = [fleet.redis() for _ in range(3)]
    shelves = [shelf_in_redis(process.port) for process in processes]
    tier = connected(fleet.tier(*shelves, replicas=2))
    talk = conversation(4, 64 * 30)
    expected = list(blocks(talk, 1000))
    assert all(map(tier.put, expected))
    processes[0].kill()
    tier.stored(path(talk))
    wait_for(lambda: states(tier)[0] != "closed")
    assert leading(tier, path(talk)) == len(expected)
    assert all(map(same, tier.get_batch(path(talk), 5.0), expected))


def _cluster_is_up(client: str, port: int) -> bool:
    asked = subprocess.run([client, "-p", str(port), "cluster", "info"], check=True, capture_output=True)
    return b"cluster_state:ok" in asked.stdout


def test_a_cluster_of_redis(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> None:
    client = shutil.which("redis-cli")
    if client is None:
        pytest.skip("redis-cli is not installed")
    processes: list[Process] = []
    for _ in range(3):
        folder = tmp_path_factory.mktemp("node")
        processes.append(fleet.redis("--cluster-enabled", "yes", "--cluster-port", str(free_port()), "--dir", str(folder)))
    nodes = [f"{LOOPBACK}:{process.port}" for process in processes]
    created = [client, "--cluster", "create", *nodes, "--cluster-yes"]
    subprocess.run(created, check=True, capture_output=True, timeout=60)
    for process in processes:
        wait_for(partial(_cluster_is_up, client, process.port), "agreeing")
    servers = [(LOOPBACK, process.port) for process in processes]
    tier = connected(fleet.tier(redis_shelf(servers, cluster=True, lookup_seconds=5.0, ttl_seconds=60.0)))
    talk = conversation(5, 64 * 20 + 7)
    expected = list(blocks(talk, 1000))
    assert all(map(tier.put, expected))
    assert leading(tier, path(talk)) == len(expected)
    assert all(map(same, tier.get_batch(path(talk), 5.0), expected))
    assert tier.following([path(talk)[-1].parent])[0][0] == (path(talk)[-1], talk[-7:])
    wait_for(lambda: tier.statistics().blocks >= len(expected))


# A network that is cut


_networks = count()


@dataclass(frozen=True)
class Network:
    """A network of its own, reached through a pair of interfaces; several runs of the tests do not meet in it."""

    number: int = field(default_factory=lambda: (os.getpid() * 10 + next(_networks)) % 50_000)

    @property
    def name(self) -> str:
        return f"pasture-{self.number}"

    def address(self, host: int) -> str:
        return f"10.{self.number // 250 + 20}.{self.number % 250}.{host}"

    def inside(self, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *command]

    def make(self) -> None:
        ours, theirs = f"pt{self.number}a", f"pt{self.number}b"
        for step in (
            ["ip", "netns", "add", self.name],
            ["ip", "link", "add", ours, "type", "veth", "peer", "name", theirs],
            ["ip", "link", "set", theirs, "netns", self.name],
            ["ip", "addr", "add", f"{self.address(1)}/24", "dev", ours],
            ["ip", "link", "set", ours, "up"],
            self.inside("ip", "addr", "add", f"{self.address(2)}/24", "dev", theirs),
            self.inside("ip", "link", "set", theirs, "up"),
            self.inside("ip", "link", "set", "lo", "up"),
        ):
            subprocess.run(step, check=True, capture_output=True)

    def reaches(self, is_there: bool) -> None:
        """Whether packets arrive inside; where they do not, nobody says so."""
        address = ("ip", "addr", "add" if is_there else "del", f"{self.address(2)}/24", "dev", f"pt{self.number}b")
        subprocess.run(self.inside(*address), check=True, capture_output=True)

    def delays(self, time: str | None) -> None:
        """What leaves it, by so much (`200ms`), or no longer; by netem, which not every kernel has."""
        device = ("dev", f"pt{self.number}b", "root")
        subprocess.run(self.inside("tc", "qdisc", "del", *device), check=False, capture_output=True)
        if time is not None:
            self._misbehave("", "tc", "qdisc", "add", *device, "netem", "delay", time)

    def loses(self, percent: int) -> None:
        """So many of the packets that arrive inside."""
        rule = f"numgen random mod 100 < {percent} drop"
        table = f"flush ruleset\ntable inet loss {{\n chain arriving {{\n type filter hook input priority 0\n {rule}\n }}\n}}\n"
        self._misbehave(table, "nft", "-f", "-")

    def _misbehave(self, told: str, *command: str) -> None:
        if shutil.which(command[0]) is None:
            pytest.skip(f"{command[0]} is not installed")
        done = subprocess.run(self.inside(*command), input=told.encode(), check=False, capture_output=True)
        if done.returncode:
            pytest.skip(f"networks cannot be made to misbehave here: {done.stderr.decode()}")

    def remove(self) -> None:
        if shutil.which("ip") is not None:
            subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True)


@pytest.fixture
def network() -> Iterator[Network]:
    network = Network()
    try:
        network.make()
    except (OSError, subprocess.CalledProcessError) as error:
        network.remove()
        pytest.skip(f"networks cannot be made here: {getattr(error, 'stderr', b'') or error}")
    yield network
    network.remove()


@pytest.fixture
def far_redis(network: Network) -> Iterator[str]:
    """The address of a Redis on port 7379 in that network."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed")
    command = network.inside(binary, "--bind", network.address(2), "--protected-mode", "no", "--port", "7379", "--save", "")
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    yield network.address(2)
    server.kill()
    server.wait(10)


def suffer(tier: RemoteTier, begin: Callable[[], None], end: Callable[[], None]) -> None:
    """Between `begin` and `end`, every question is a miss, and nobody waits once that is known; after it, all is there."""
    expected = list(blocks(TALK, 1000))
    assert all(map(tier.put, expected))
    begin()
    for _ in range(3):
        assert not any(tier.stored(path(TALK)))
    wait_for(lambda: states(tier) != ["closed"])
    assert tier.get_batch(path(TALK), 5.0) == [None] * len(expected)
    assert not tier.put(expected[0])
    end()
    started = time.monotonic()
    connected(tier)
    assert time.monotonic() - started < RECOVERY_SECONDS
    wait_for(lambda: leading(tier, path(TALK)) == len(expected))


def test_a_network_that_is_cut(network: Network, far_redis: str, fleet: Fleet) -> None:
    shelf = redis_shelf([(far_redis, 7379)], lookup_seconds=LOOKUP_SECONDS, ttl_seconds=60.0)
    tier = connected(fleet.tier(shelf, lookup_seconds=LOOKUP_SECONDS))
    suffer(tier, lambda: network.reaches(False), lambda: network.reaches(True))


def test_a_network_that_is_cut_before_the_master_of_a_pool(network: Network, fleet: Fleet) -> None:
    far = network.address(2)
    master = network.inside(mooncake_master(), f"-rpc_address={far}", "-rpc_port=7379", "-metrics_port=7380", "-client_ttl=30")
    server = subprocess.Popen(master, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        shelf = MooncakeShelf((far, 7379), protocol="tcp", device="", share_bytes=32 << 20, host=None)
        tier = connected(fleet.tier(shelf, lookup_seconds=LOOKUP_SECONDS, list_all=False))
        suffer(tier, lambda: network.reaches(False), lambda: network.reaches(True))
    finally:
        server.kill()
        server.wait(10)


def test_a_network_with_a_delay_above_the_limit(network: Network, far_redis: str, fleet: Fleet) -> None:
    shelf = redis_shelf([(far_redis, 7379)], lookup_seconds=0.15, ttl_seconds=60.0)
    tier = connected(fleet.tier(shelf, lookup_seconds=0.15))
    suffer(tier, lambda: network.delays("200ms"), lambda: network.delays(None))


@pytest.mark.parametrize("percent", [5, 30])
def test_a_network_that_loses_packets(percent: int, network: Network, far_redis: str, fleet: Fleet) -> None:
    shelf = redis_shelf([(far_redis, 7379)], lookup_seconds=0.15, ttl_seconds=60.0)
    tier = connected(fleet.tier(shelf, lookup_seconds=0.15))
    expected = list(blocks(TALK, BLOCK_BYTES))
    assert all(map(tier.put, expected))
    wait_for(lambda: leading(tier, path(TALK)) == len(expected))
    network.loses(percent)
    for _ in range(5):
        started = time.monotonic()
        found = tier.get_batch(path(TALK), 0.5)
        assert time.monotonic() - started < 0.5 + LOOKUP_SECONDS
        assert all(block is None or same(block, wanted) for block, wanted in zip(found, expected, strict=True))
    network.loses(0)
    started = time.monotonic()
    connected(tier)
    wait_for(lambda: leading(tier, path(TALK)) == len(expected))
    assert time.monotonic() - started < RECOVERY_SECONDS


def test_a_cable_with_a_delay_above_the_limit(fleet: Fleet) -> None:
    cable = Cable(fleet.redis().port)
    tier = connected(fleet.tier(shelf_in_redis(cable.port), lookup_seconds=0.15))
    suffer(tier, lambda: setattr(cable, "delay_seconds", 0.4), lambda: setattr(cable, "delay_seconds", 0.0))
    cable.close()


def test_a_cable_that_is_cut_while_a_block_is_on_its_way(fleet: Fleet) -> None:
    cable = Cable(fleet.redis().port)
    tier = connected(fleet.tier(shelf_in_redis(cable.port), lookup_seconds=LOOKUP_SECONDS))
    suffer(tier, lambda: setattr(cable, "cut", True), lambda: setattr(cable, "cut", False))
    cable.close()


# TLS, and a user who may do no more than he must


def certificate(folder: Path) -> tuple[Path, Path]:
    """One for 127.0.0.1, signed by itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pasture tests")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(LOOPBACK))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    files = folder / "cert.pem", folder / "key.pem"
    files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, plain))
    return files


def _errors(tier: RemoteTier) -> int:
    return tier.statistics().errors


def test_redis_over_tls_with_an_acl(fleet: Fleet, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    rules = (
        "user",
        "default",
        "off",
        "user",
        "herd",
        "on",
        ">secret",
        "~pasture:*",
        "+@read",
        "+@write",
        "+info",
        "+dbsize",
    )
    configuration = tmp_path / "redis.conf"
    configuration.write_text(f"{' '.join(rules[:3])}\n{' '.join(rules[3:])}\n")
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed")
    options = ["--bind", LOOPBACK, "--save", "", "--port", "0", "--tls-auth-clients", "no"]
    options += ["--tls-cert-file", str(cert), "--tls-key-file", str(key)]
    process = Process(lambda port: [binary, str(configuration), *options, "--tls-port", str(port)])
    fleet.processes.append(process)
    url = f"rediss://herd:secret@{LOOPBACK}:{process.port}?ca={cert}&lookup=5s"
    tier = open_remote(parse_remote(url), None)
    fleet.tiers.append(tier)
    connected(tier)
    expected = list(blocks(TALK, 1000))
    assert all(map(tier.put, expected))
    assert leading(tier, path(TALK)) == len(expected)
    assert tier.following([path(TALK)[-1].parent])[0]
    tier.remove(expected[0].address.key)
    assert not tier.stored(path(TALK))[0]
    wait_for(lambda: tier.statistics().blocks)
    for wrong in (
        f"rediss://herd:wrong@{LOOPBACK}:{process.port}?ca={cert}",
        f"rediss://herd:secret@{LOOPBACK}:{process.port}",
    ):
        stranger = open_remote(parse_remote(wrong), None)
        fleet.tiers.append(stranger)
        wait_for(partial(_errors, stranger))
        assert not stranger.accepts


def test_a_block_larger_than_a_lane_of_the_arena_goes_through(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_mooncake, "LANE_BYTES", 64 << 10)
    tier = connected(fleet.tier(shelf_in_mooncake(fleet.mooncake().port)))
    small, large = list(blocks(TALK[:128], 20_000)), list(blocks(conversation(8, 128), BLOCK_BYTES))
    assert all(map(tier.put, [*small, *large]))
    found = tier.get_batch([block.address for block in (*small, *large)], 5.0)
    assert all(map(same, found, [*small, *large]))
