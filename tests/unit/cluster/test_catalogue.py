"""What is credited to whom: exactly what arrived without a gap, in this epoch, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pasture.cluster.catalogue import Catalogue
from pasture.cluster.values import Delta, Epoch, ReplicaId, Snapshot, SnapshotRequest
from pasture.core.storage import BlockKey

A, B = ReplicaId("a"), ReplicaId("b")
ONE, TWO = Epoch(1), Epoch(2)


def keys(*names: str) -> tuple[BlockKey, ...]:
    return tuple(BlockKey(name.encode()) for name in names)


PATH = keys("x", "y", "z")


@pytest.fixture
def catalogue() -> Catalogue:
    catalogue = Catalogue()
    catalogue.begin(A, ONE)
    catalogue.begin(B, ONE)
    return catalogue


def test_what_was_stored_is_credited_up_to_the_first_missing_block(catalogue: Catalogue) -> None:
    catalogue.apply(Delta(A, ONE, 1, stored=PATH))
    catalogue.apply(Delta(B, ONE, 1, stored=keys("x", "z")))
    assert catalogue.leading(PATH) == {A: 3, B: 1}
    assert catalogue.leading(keys("q")) == {}
    assert len(catalogue) == 3


def test_what_was_removed_is_not_credited(catalogue: Catalogue) -> None:
    catalogue.apply(Delta(A, ONE, 1, stored=PATH))
    catalogue.apply(Delta(A, ONE, 2, removed=keys("z", "never")))
    assert catalogue.leading(PATH) == {A: 2}


def test_an_event_seen_twice_counts_once(catalogue: Catalogue) -> None:
    catalogue.apply(Delta(A, ONE, 1, stored=PATH))
    catalogue.apply(Delta(A, ONE, 2, removed=PATH))
    assert catalogue.apply(Delta(A, ONE, 1, stored=PATH)) is None
    assert catalogue.leading(PATH) == {}
    assert catalogue.stale == 1


def test_a_gap_credits_nothing_until_a_snapshot_comes(catalogue: Catalogue) -> None:
    catalogue.apply(Delta(A, ONE, 1, stored=PATH))
    assert catalogue.apply(Delta(A, ONE, 3, stored=keys("w"))) == SnapshotRequest(A, ONE)
    assert catalogue.leading(PATH) == {}
    assert catalogue.apply(Delta(A, ONE, 4, stored=PATH)) == SnapshotRequest(A, ONE)
    assert catalogue.gaps == 1
    catalogue.apply(Snapshot(A, ONE, 4, keys("x")))
    assert catalogue.leading(PATH) == {A: 1}
    assert catalogue.apply(Delta(A, ONE, 5, stored=keys("y"))) is None
    assert catalogue.leading(PATH) == {A: 2}


def test_a_snapshot_from_before_what_is_known_is_dropped(catalogue: Catalogue) -> None:
    for number in (1, 2, 3):
        catalogue.apply(Delta(A, ONE, number, stored=keys("x")))
    catalogue.apply(Snapshot(A, ONE, 2, PATH))
    assert catalogue.leading(PATH) == {A: 1}


def test_a_restart_loses_everything(catalogue: Catalogue) -> None:
    catalogue.apply(Delta(A, ONE, 1, stored=PATH))
    assert catalogue.apply(Delta(A, TWO, 1, stored=keys("x"))) is None
    assert catalogue.leading(PATH) == {A: 1}
    assert catalogue.apply(Delta(A, ONE, 2, stored=PATH)) is None
    catalogue.apply(Snapshot(A, ONE, 9, PATH))
    assert catalogue.leading(PATH) == {A: 1}
    assert not catalogue.begin(A, ONE)
    assert catalogue.epoch(A) == TWO


def test_who_is_dropped_leaves_room_for_the_next(catalogue: Catalogue) -> None:
    catalogue.apply(Delta(A, ONE, 1, stored=PATH))
    catalogue.drop(A)
    catalogue.drop(A)
    assert A not in catalogue
    assert len(catalogue) == 0
    catalogue.begin(ReplicaId("c"), ONE)
    assert catalogue.leading(PATH) == {}
    with pytest.raises(KeyError):
        catalogue.apply(Delta(A, ONE, 2))


_BLOCKS = st.lists(st.sampled_from(keys(*"abcdef")), max_size=4).map(tuple)


class _Replica:
    """What a replica really holds, and every event it has sent."""

    def __init__(self, name: ReplicaId) -> None:
        self.name, self.epoch, self.number = name, ONE, 0
        self.held: set[BlockKey] = set()

    def change(self, stored: tuple[BlockKey, ...], removed: tuple[BlockKey, ...]) -> Delta:
        self.held = (self.held | set(stored)) - set(removed)
        self.number += 1
        return Delta(self.name, self.epoch, self.number, stored, removed)

    def restart(self) -> None:
        self.epoch, self.number, self.held = Epoch(self.epoch + 1), 0, set()

    def snapshot(self) -> Snapshot:
        return Snapshot(self.name, self.epoch, self.number, tuple(self.held))


_STEP = st.one_of(
    st.tuples(st.just("change"), st.sampled_from((0, 1)), _BLOCKS, _BLOCKS),
    st.tuples(st.sampled_from(("restart", "snapshot", "lost", "again")), st.sampled_from((0, 1)), _BLOCKS, _BLOCKS),
)


@given(st.lists(_STEP, max_size=40))
def test_credit_is_what_was_held_at_the_last_number_or_nothing(
    steps: list[tuple[str, int, tuple[BlockKey, ...], tuple[BlockKey, ...]]],
) -> None:
    catalogue, replicas = Catalogue(), (_Replica(A), _Replica(B))
    history: dict[ReplicaId, list[set[BlockKey]]] = {A: [set()], B: [set()]}
    """what each has held in this epoch, by number"""
    last: dict[ReplicaId, list[Delta]] = {A: [], B: []}
    heard: dict[ReplicaId, bool] = {A: True, B: True}
    """whether everything so far has arrived"""
    for replica in replicas:
        catalogue.begin(replica.name, replica.epoch)
    for what, who, stored, removed in steps:
        replica = replicas[who]
        name = replica.name
        if what == "restart":
            replica.restart()
            catalogue.begin(name, replica.epoch)
            history[name] = []
            heard[name] = True
        elif what == "snapshot":
            assert catalogue.apply(replica.snapshot()) is None
            heard[name] = True
        elif what == "again":
            for event in last[name]:
                catalogue.apply(event)
        else:
            event = replica.change(stored, removed)
            if what == "lost":
                heard[name] = False
            else:
                wanted = catalogue.apply(event)
                assert (wanted is None) == heard[name]
                last[name] = [*last[name], event][-3:]
        history[name].append(set(replica.held))
        for other in replicas:
            credited = {key for key in keys(*"abcdef") if catalogue.holds(other.name, key)}
            possible = [other.held] if heard[other.name] else history[other.name]
            assert credited in possible
