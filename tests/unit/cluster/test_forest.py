"""The prefix trees of several replicas as one picture: every node is one of somebody's, below its own parent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from pasture.cluster import forest as forests
from pasture.cluster.forest import marks, number_of, origin
from pasture.cluster.members import Member
from pasture.cluster.sums import total
from pasture.cluster.values import Epoch, ReplicaId
from pasture.core.statistics import MAX_PREFIXES, PrefixStatistics, SequenceState, SequenceStatistics, ServiceStatistics
from pasture.core.values import DEFAULT_NAMESPACE, SeqId
from tests.unit.stub_service import StubService

R0, R1 = ReplicaId("r0"), ReplicaId("r1")


def member(replica: ReplicaId, epoch: int = 1) -> Member:
    return Member(replica, Epoch(epoch), "127.0.0.1", 7000)


def node(number: int, parent: int | None, n_tokens: int, holders: int) -> PrefixStatistics:
    return PrefixStatistics(number, parent, DEFAULT_NAMESPACE, 0, n_tokens, holders, 0, 1.0, number, ())


def holding(prefixes: Sequence[PrefixStatistics], ends: Sequence[int | None]) -> ServiceStatistics:
    """A replica with this tree, and a sequence that ends in each of these nodes."""
    found = StubService().statistics()
    sequences = tuple(
        SequenceStatistics(SeqId(n), DEFAULT_NAMESPACE, SequenceState.IDLE, 9, 0, 1.0, None, end) for n, end in enumerate(ends)
    )
    return replace(found, pool=replace(found.pool, prefixes=tuple(prefixes), sequences=sequences))


SMALL = [node(1, None, 100, 2), node(2, 1, 10, 1), node(3, 1, 20, 1)]


def test_nodes_of_two_replicas_keep_apart_and_everybody_finds_their_own() -> None:
    marked = marks([member(R0), member(R1)])
    other = [node(1, None, 300, 1), node(2, 1, 5, 1)]
    pool = total(StubService.model, {R0: holding(SMALL, [2, 3]), R1: holding(other, [2, None])}, marked, draining=False).pool
    by_number = {prefix.number: prefix for prefix in pool.prefixes}
    assert len(by_number) == 5
    known = {(prefix.replica, origin(prefix.number)[0]): prefix for prefix in pool.prefixes}
    assert set(known) == {(R0, 1), (R0, 2), (R0, 3), (R1, 1), (R1, 2)}
    assert {(p.replica, own): p.n_tokens for (_, own), p in known.items()}[R1, 1] == 300
    for (replica, own), prefix in known.items():
        assert origin(prefix.number) == (own, marked[ReplicaId(str(replica))])
        parent = None if prefix.parent is None else by_number[prefix.parent]
        assert (parent is None) == (own == 1)
        assert parent is None or (parent.replica, origin(parent.number)[0]) == (replica, 1)
    ends = [None if row.prefix is None else by_number[row.prefix] for row in pool.sequences]
    assert [None if end is None else (end.replica, origin(end.number)[0]) for end in ends] == [(R0, 2), (R0, 3), (R1, 2), None]


def test_of_large_trees_that_part_is_shown_which_weighs_most_and_no_node_without_its_parent() -> None:
    marked = marks([member(R0), member(R1)])
    light = [node(n, None if n == 1 else n - 1, 10, 1) for n in range(1, MAX_PREFIXES + 1)]
    heavy = [node(n, None if n < 100 else n - 99, 1000, 2) for n in range(1, MAX_PREFIXES - 10)]
    shown = total(StubService.model, {R0: holding(light, []), R1: holding(heavy, [])}, marked, draining=False).pool.prefixes
    assert Counter(prefix.replica for prefix in shown) == {R1: len(heavy), R0: MAX_PREFIXES - len(heavy)}
    seen: set[int | None] = {None}
    for prefix in shown:
        assert prefix.parent in seen, "parents come before children"
        seen.add(prefix.number)


def test_a_number_stays_while_others_come_and_go_and_is_not_given_again_to_a_later_start() -> None:
    before = marks([member(R0), member(R1)])
    assert marks([member(R1), member(R0), member(ReplicaId("r2"))]).items() >= before.items()
    assert marks([member(R0)]) == {R0: before[R0]}
    assert marks([member(R0, epoch=2)])[R0] not in before.values()


def test_numbers_are_such_that_a_page_can_tell_them_apart() -> None:
    for own in (0, 7, (1 << 37) - 1):
        for mark in (0, forests._MARKS - 1):
            assert origin(number_of(own, mark)) == (own, mark)
            assert number_of(own, mark) < 1 << 53


def test_two_starts_with_one_hash_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forests, "_MARKS", 3)
    members = [member(ReplicaId(f"r{n}")) for n in range(3)]
    assert sorted(marks(members).values()) == [0, 1, 2]
    assert marks(members) == marks(members[::-1])
