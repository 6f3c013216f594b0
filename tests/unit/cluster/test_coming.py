"""Prompts in flight: what a later one will find, and where."""

from __future__ import annotations

from pasture.cluster.coming import COMPARED, Coming
from pasture.cluster.values import ReplicaId
from pasture.core.storage import BlockKey
from pasture.core.values import RequestId

A, B = ReplicaId("a"), ReplicaId("b")


def path(text: str) -> tuple[BlockKey, ...]:
    return tuple(BlockKey(letter.encode()) for letter in text)


def name(number: int) -> RequestId:
    return RequestId(f"r{number}")


def test_the_longest_common_beginning_at_each_replica() -> None:
    coming = Coming()
    for number, (replica, text) in enumerate(((A, "xyz"), (A, "xyabc"), (B, "xyab"), (B, "x"), (A, "qyabc"))):
        coming.started(name(number), path(text)[0], replica, path(text))
    assert coming.leading(BlockKey(b"x"), path("xyabcd")) == {A: 5, B: 4}
    assert coming.leading(BlockKey(b"q"), path("qz")) == {A: 1}
    assert coming.leading(BlockKey(b"w"), path("w")) == {}


def test_what_has_ended_or_gone_elsewhere_is_not_coming() -> None:
    coming = Coming()
    coming.started(name(0), BlockKey(b"x"), A, path("xyz"))
    coming.started(name(1), BlockKey(b"x"), B, path("xy"))
    coming.started(name(0), BlockKey(b"x"), B, path("xyz"))
    assert coming.leading(BlockKey(b"x"), path("xyz")) == {B: 3}
    coming.finished(name(0))
    coming.finished(name(0))
    assert coming.leading(BlockKey(b"x"), path("xyz")) == {B: 2}
    coming.forget(A)
    assert coming.leading(BlockKey(b"x"), path("xyz")) == {B: 2}
    coming.forget(B)
    assert coming.leading(BlockKey(b"x"), path("xyz")) == {}


def test_only_the_last_few_with_one_beginning_are_compared() -> None:
    coming = Coming()
    coming.started(name(0), BlockKey(b"x"), A, path("xyz"))
    for number in range(1, COMPARED):
        coming.started(name(number), BlockKey(b"x"), B, path("xy"))
    assert coming.leading(BlockKey(b"x"), path("xyz")) == {A: 3, B: 2}
    coming.started(name(COMPARED), BlockKey(b"x"), B, path("xy"))
    assert coming.leading(BlockKey(b"x"), path("xyz")) == {B: 2}
