"""The ring: everybody gets a fair share, and little moves when somebody comes or goes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pasture.cluster.ring import Ring
from pasture.cluster.values import ReplicaId

KEYS = [number.to_bytes(4, "big") for number in range(4000)]


def ring_of(*names: str) -> Ring:
    ring = Ring()
    ring.set_members(map(ReplicaId, names))
    return ring


def names(n: int) -> list[str]:
    return [f"replica-{number}" for number in range(n)]


def test_an_empty_ring_owns_nothing() -> None:
    assert ring_of().owner(b"key") is None


def test_an_order_names_everybody_once_and_begins_with_the_owner() -> None:
    ring = ring_of(*names(5))
    for key in KEYS[:50]:
        order = list(ring.order(key))
        assert sorted(order) == names(5)
        assert order[0] == ring.owner(key)


def test_the_order_does_not_depend_on_who_came_first() -> None:
    assert list(ring_of("a", "b", "c").order(b"key")) == list(ring_of("c", "a", "b").order(b"key"))


def test_shares_are_fair() -> None:
    ring = ring_of(*names(8))
    owners = [ring.owner(key) for key in KEYS]
    shares = [owners.count(ReplicaId(name)) / len(KEYS) for name in names(8)]
    assert max(shares) < 1.3 / 8
    assert min(shares) > 0.7 / 8


@settings(max_examples=10, deadline=None)
@given(n=st.integers(2, 20), salt=st.text(max_size=4))
def test_joining_and_leaving_move_at_most_one_and_a_half_shares(n: int, salt: str) -> None:
    few, many = [f"{salt}{name}" for name in names(n - 1)], [f"{salt}{name}" for name in names(n)]
    ring = ring_of(*few)
    before = {key: ring.owner(key) for key in KEYS}
    ring.set_members(map(ReplicaId, many))
    after = {key: ring.owner(key) for key in KEYS}
    moved = [key for key in KEYS if before[key] != after[key]]
    assert len(moved) <= 1.5 / n * len(KEYS)
    assert {after[key] for key in moved} <= {ReplicaId(many[-1])}, "somebody gave a key to one who was there before"
    ring.set_members(map(ReplicaId, few))
    assert {key: ring.owner(key) for key in KEYS} == before
