"""What is in flight where: one's own requests exactly, the others' as reported."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pasture.cluster.loads import Loads
from pasture.cluster.values import Load, ReplicaId
from pasture.core.values import RequestId

A, B = ReplicaId("a"), ReplicaId("b")
R, S = RequestId("r"), RequestId("s")


def test_a_request_counts_with_what_is_left_of_it() -> None:
    loads = Loads()
    loads.started(R, A, 1000)
    loads.started(S, A, 10)
    loads.progress(R, 400)
    assert (loads.of(A), loads.of(B)) == (410, 0)
    loads.finished(R)
    loads.finished(R)
    loads.progress(R, 99)
    assert loads.of(A) == 10


def test_a_request_that_starts_again_elsewhere_has_left() -> None:
    loads = Loads()
    loads.started(R, A, 1000)
    loads.started(R, B, 300)
    assert (loads.of(A), loads.of(B)) == (0, 300)


def test_what_others_have_sent_comes_on_top() -> None:
    loads = Loads()
    loads.started(R, A, 1000)
    loads.reported(A, Load(1500))
    assert loads.of(A) == 1500
    loads.finished(R)
    assert loads.of(A) == 500
    loads.reported(A, Load(0))
    assert loads.of(A) == 0


def test_a_report_from_before_ones_own_request_takes_nothing_from_it() -> None:
    loads = Loads()
    loads.started(R, A, 1000)
    loads.reported(A, Load(0))
    assert loads.of(A) == 1000


def test_a_restart_ends_what_was_in_flight() -> None:
    loads = Loads()
    loads.started(R, A, 1000)
    loads.reported(A, Load(5000))
    loads.forget(A)
    assert loads.of(A) == 0
    loads.progress(R, 700)
    loads.finished(R)
    assert loads.of(A) == 0


@given(
    st.lists(st.tuples(st.sampled_from("sp f".replace(" ", "")), st.integers(0, 5), st.sampled_from((A, B)), st.integers(0, 9)))
)
def test_the_sum_is_that_of_the_requests_that_have_not_ended(steps: list[tuple[str, int, ReplicaId, int]]) -> None:
    loads, mine = Loads(), dict[int, tuple[ReplicaId, int]]()
    for what, number, replica, tokens in steps:
        request = RequestId(str(number))
        if what == "s":
            loads.started(request, replica, tokens)
            mine[number] = (replica, tokens)
        elif what == "p":
            loads.progress(request, tokens)
            if number in mine:
                mine[number] = (mine[number][0], tokens)
        else:
            loads.finished(request)
            mine.pop(number, None)
        for who in (A, B):
            assert loads.of(who) == sum(left for where, left in mine.values() if where == who)
