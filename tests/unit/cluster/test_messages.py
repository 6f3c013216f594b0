"""Frames as bytes and back: what arrives is what was sent, and nothing but the types that can come this way."""

from __future__ import annotations

import math
from array import array

import msgspec
import pytest

from pasture.cluster import messages
from pasture.cluster.members import Member
from pasture.cluster.values import Epoch, ReplicaId
from pasture.core import errors
from pasture.core.errors import EngineError, PastureError, QueueFull, RequestError
from pasture.core.statistics import PrefixContent
from pasture.core.values import (
    Allowance,
    Constraint,
    ConstraintKind,
    Finish,
    FinishReason,
    Namespace,
    PoolShape,
    Request,
    RequestId,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
    Usage,
    Whereabouts,
)
from pasture.engine.fake import FakeEngine
from pasture.scheduler.service import LocalService
from tests.store_support import store_for

MEMBER = Member(ReplicaId("r1"), Epoch(2**62), "127.0.0.1", 7000)
DEFAULT = Namespace("default")


def at_an_ingress(frame: messages.Frame) -> messages.FromReplica:
    return messages.from_replica(messages.encode(frame))


def told(event: TokenEvent) -> TokenEvent:
    back = at_an_ingress(messages.Events([messages.Event.of(9, event)]))
    assert isinstance(back, messages.Events)
    assert [one.id for one in back.events] == [9]
    return back.events[0].value


def request() -> Request:
    form = Constraint(ConstraintKind.JSON_SCHEMA, "{}", "response_format")
    sampling = SamplingParams(seed=3, logit_bias={7: -math.inf, 8: 0.5}, constraint=form)
    return Request(RequestId("a"), (1, 2), 3, sampling, stop_tokens=frozenset({5}), deadline_seconds=1.5, session="s")


@pytest.mark.parametrize(
    "frame",
    [
        messages.Generate(1, request(), "s", 40, messages.Source(MEMBER, 64)),
        messages.Generate(2, request(), None, 0, None),
        messages.Acknowledge(1, 64),
        messages.Cancel(1),
        messages.Watch(),
        messages.AskSnapshot(),
        messages.Allow(DEFAULT, Allowance(2.0, None, 5, 6, 0.5)),
        messages.KeepFor({DEFAULT: 0.5}),
        messages.Anticipate(DEFAULT, b"\1\0\0\0", True),
        messages.Unpin(3),
        messages.Locate(4, DEFAULT, b"", True),
        messages.Export(5, DEFAULT, b""),
        messages.Restore(6, DEFAULT, b"", "s"),
        messages.Pin(7, DEFAULT, b""),
        messages.Prefetch(8, DEFAULT, b""),
        messages.OpenPrefix(8, 2**37 - 1, 320),
        messages.Verify(9),
        messages.HandOver(10, (MEMBER, MEMBER)),
    ],
    ids=lambda frame: type(frame).__name__,
)
def test_what_a_replica_gets(frame: messages.ToReplica) -> None:
    assert messages.to_replica(messages.encode(frame)) == frame


@pytest.mark.parametrize(
    "frame",
    [
        messages.Located(1, Whereabouts(3, 2, 1, {"disk": 64})),
        messages.Opened(1, PrefixContent((5, 6), 40, 30, {"disk": 20})),
        messages.Opened(1, None),
        messages.Counted(2, {"tokens": 3}),
        messages.Done(3),
        messages.Delta(4, 1, 0),
        messages.Snapshot(5, 7),
        messages.Homes([("s", None), ("t", "00ff")]),
        messages.Pulled(1 << 40, 0.25),
    ],
    ids=lambda frame: type(frame).__name__,
)
def test_what_an_ingress_gets(frame: messages.FromReplica) -> None:
    assert at_an_ingress(frame) == frame


def test_events() -> None:
    usage = Usage(3, 1, 2, 0.1, 0.2, 0.3, 1)
    for event in (
        TokenEvent(5),
        TokenEvent(5, TokenLogprobs(-0.5, ((5, -0.5), (6, -math.inf))), usage=usage),
        TokenEvent(None, finish=Finish(FinishReason.STOP, usage)),
    ):
        assert told(event) == event


def test_an_event_that_failed() -> None:
    back = told(TokenEvent(None, finish=Finish(FinishReason.ERROR, Usage(1, 0, 0), EngineError("broken"))))
    assert back.finish is not None
    assert isinstance(back.finish.error, EngineError)
    assert str(back.finish.error) == "broken"


def test_every_error_of_the_tree() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PastureError)]
    assert len(kinds) > 12
    for kind in kinds:
        extra = {"retry_after_seconds": 2.0} if issubclass(kind, QueueFull) else {}
        error = kind("why", **extra)
        if isinstance(error, RequestError):
            error.param = "prompt"
        back = at_an_ingress(messages.Failed(1, error))
        assert isinstance(back, messages.Failed)
        assert type(back.error) is kind
        assert (str(back.error), vars(back.error)) == ("why", vars(error))


def test_who_a_replica_is_and_how_it_does() -> None:
    engine = FakeEngine(PoolShape(512, 4))
    service = LocalService(engine, store_for(engine))
    try:
        found = messages.Statistics(service.statistics())
    finally:
        service.close()
    assert at_an_ingress(found) == found


def test_tokens() -> None:
    tokens = array("i", [0, 1, 2**31 - 1])
    assert messages.unpack_tokens(tokens.tobytes()) == tokens
    with pytest.raises(messages.BadFrame):
        messages.unpack_tokens(b"\0\0\0")


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode(None),
        msgspec.msgpack.encode([]),
        msgspec.msgpack.encode(["Exec", "import os"]),
        msgspec.msgpack.encode(["Cancel", "1"]),
        msgspec.msgpack.encode(["Cancel"]),
        messages.encode(messages.Done(1)),
    ],
)
def test_bytes_that_are_no_frame(wrong: bytes) -> None:
    with pytest.raises(messages.BadFrame):
        messages.to_replica(wrong)


@pytest.mark.parametrize("name", ["Mapping", "__class__"])
def test_an_error_that_is_none_of_ours(name: str) -> None:
    with pytest.raises(messages.BadFrame, match="no error of pasture's"):
        messages.from_replica(msgspec.msgpack.encode(["Failed", 1, [name, "why", None, None]]))


@pytest.mark.parametrize("error", [["EngineError"], 3, None])
def test_an_error_without_its_parts(error: object) -> None:
    with pytest.raises(messages.BadFrame):
        messages.from_replica(msgspec.msgpack.encode(["Failed", 1, error]))


def test_what_has_no_business_in_a_frame() -> None:
    with pytest.raises((TypeError, NotImplementedError)):
        messages.encode(messages.Failed(1, array("i", [1])))  # type: ignore[arg-type]
