"""The list of a cluster's members: the latest start counts, silence is forgotten, a drain is for one start."""

from __future__ import annotations

from dataclasses import replace

from pasture.cluster.members import Member
from pasture.cluster.register import FORGOTTEN_SECONDS, Register
from pasture.cluster.values import Epoch, ReplicaId

FIRST = Member(ReplicaId("r1"), Epoch(1), "127.0.0.1", 1000)
SECOND = replace(FIRST, epoch=Epoch(2), port=2000)


def test_a_later_start_takes_the_place_of_an_earlier_one() -> None:
    register = Register()
    register.join(FIRST)
    register.join(SECOND)
    register.join(FIRST)
    assert register.members() == (SECOND,)
    register.leave(FIRST.replica, FIRST.epoch)
    assert register.members() == (SECOND,), "the one that left was gone already"
    register.leave(SECOND.replica, SECOND.epoch)
    assert register.members() == ()


def test_a_drain_outlives_the_next_joining_but_not_a_restart() -> None:
    register = Register()
    register.drain(FIRST.replica)
    register.join(FIRST)
    register.drain(FIRST.replica)
    register.join(FIRST)
    assert register.members() == (replace(FIRST, draining=True),)
    register.join(SECOND)
    assert register.members() == (SECOND,)


def test_who_says_nothing_is_forgotten() -> None:
    now = 0.0
    register = Register(lambda: now)
    register.join(FIRST)
    now = FORGOTTEN_SECONDS
    assert register.members() == (FIRST,)
    now += 1
    assert register.members() == ()
