"""Real stores on loopback, killed, frozen, filled, emptied and cut off: a miss within its time, and back within seconds.

Each disaster runs against a Redis and against a Mooncake pool. What is asserted is what a request sees: nothing raised, nothing
wrong, nothing waited for that could have been given up; and that blocks are found again once the store is there.
"""

from __future__ import annotations

import datetime
import ipaddress
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pasture.config.remote import parse_remote
from pasture.stores import open_remote
from pasture.tiers.remote import RemoteTier
from pasture.tiers.remote_ports import Shelf
from pasture.tiers.remote_redis import redis_shelf
from tests.blocks import blocks, conversation, leading, path, same
from tests.remote_support import (
    LOOPBACK,
    Fleet,
    Process,
    connected,
    free_port,
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


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network of its own, reached through a pair of interfaces; 10.213.7.2 is inside."""
    name = "pasture-test"
    ours, theirs = "pasture-t0", "pasture-t1"
    steps: list[Sequence[str]] = [
        ("ip", "netns", "add", name),
        ("ip", "link", "add", ours, "type", "veth", "peer", "name", theirs),
        ("ip", "link", "set", theirs, "netns", name),
        ("ip", "addr", "add", "10.213.7.1/24", "dev", ours),
        ("ip", "link", "set", ours, "up"),
        ("ip", "netns", "exec", name, "ip", "addr", "add", "10.213.7.2/24", "dev", theirs),
        ("ip", "netns", "exec", name, "ip", "link", "set", theirs, "up"),
        ("ip", "netns", "exec", name, "ip", "link", "set", "lo", "up"),
    ]
    remove = ("ip", "netns", "del", name)
    try:
        for step in steps:
            subprocess.run(step, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        subprocess.run(remove, check=False, capture_output=True) if shutil.which("ip") else None
        pytest.skip(f"networks cannot be made here: {getattr(error, 'stderr', b'') or error}")
    yield name
    subprocess.run(remove, check=False, capture_output=True)


def netem(namespace: str, *what: str) -> None:
    """Let the network inside misbehave; without arguments, behave."""
    tc = ("ip", "netns", "exec", namespace, "tc", "qdisc")
    subprocess.run((*tc, "del", "dev", "pasture-t1", "root"), check=False, capture_output=True)
    if what:
        done = subprocess.run((*tc, "add", "dev", "pasture-t1", "root", "netem", *what), check=False, capture_output=True)
        if done.returncode:
            pytest.skip(f"networks cannot be made to misbehave here: {done.stderr.decode()}")


@pytest.mark.parametrize("trouble", [("loss", "100%"), ("delay", "400ms")], ids=["partition", "delay"])
def test_a_network_that_is_cut_or_slow_is_a_miss_until_it_is_back(
    namespace: str, trouble: tuple[str, ...], fleet: Fleet
) -> None:
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed")
    port = 7379
    command = ["ip", "netns", "exec", namespace, binary, "--bind", "10.213.7.2", "--protected-mode", "no"]
    server = subprocess.Popen([*command, "--port", str(port), "--save", ""], stdout=subprocess.DEVNULL)
    try:
        shelf = redis_shelf([("10.213.7.2", port)], lookup_seconds=LOOKUP_SECONDS, ttl_seconds=60.0)
        tier = connected(fleet.tier(shelf, lookup_seconds=LOOKUP_SECONDS))
        expected = list(blocks(TALK, 1000))
        assert all(map(tier.put, expected))
        netem(namespace, *trouble)
        for _ in range(3):
            assert not any(tier.stored(path(TALK)))
        wait_for(lambda: states(tier) != ["closed"])
        assert tier.get_batch(path(TALK), 5.0) == [None] * len(expected)
        netem(namespace)
        started = time.monotonic()
        connected(tier)
        assert time.monotonic() - started < RECOVERY_SECONDS
        assert leading(tier, path(TALK)) == len(expected)
        netem(namespace, "loss", "5%")
        found = tier.get_batch(path(TALK), 5.0)
        assert all(block is None or same(block, wanted) for block, wanted in zip(found, expected, strict=True))
    finally:
        server.kill()
        server.wait(10)


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
        "+ping",
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
