"""Values as JSON and back: what arrives is what was sent, and nothing but the classes that were asked for."""

from __future__ import annotations

import math
from array import array
from typing import Any, TypeVar

import orjson
import pytest

from pasture.cluster.link import event_from_plain, event_to_plain
from pasture.cluster.plain import from_plain, to_plain
from pasture.core import errors
from pasture.core.errors import EngineError, PastureError, QueueFull, RequestError
from pasture.core.statistics import ServiceStatistics
from pasture.core.values import (
    Constraint,
    ConstraintKind,
    Finish,
    FinishReason,
    PoolShape,
    Request,
    RequestId,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
    Usage,
)
from pasture.engine.fake import FakeEngine
from pasture.scheduler.service import LocalService
from tests.store_support import store_for

T = TypeVar("T")


def there_and_back(kind: type[T], value: T) -> T:
    return from_plain(kind, orjson.loads(orjson.dumps(to_plain(value))))


def test_a_request() -> None:
    form = Constraint(ConstraintKind.JSON_SCHEMA, "{}", "response_format")
    sampling = SamplingParams(seed=3, logit_bias={7: -math.inf, 8: 0.5}, constraint=form)
    request = Request(RequestId("a"), (1, 2), 3, sampling, stop_tokens=frozenset({5}), deadline_seconds=1.5, session="s")
    assert there_and_back(Request, request) == request


def test_events() -> None:
    usage = Usage(3, 1, 2, 0.1, 0.2, 0.3, 1)
    for event in (
        TokenEvent(5),
        TokenEvent(5, TokenLogprobs(-0.5, ((5, -0.5), (6, -math.inf))), usage=usage),
        TokenEvent(None, finish=Finish(FinishReason.STOP, usage)),
    ):
        assert event_from_plain(orjson.loads(orjson.dumps(event_to_plain(9, event)))) == event


def test_an_event_that_failed() -> None:
    failed = TokenEvent(None, finish=Finish(FinishReason.ERROR, Usage(1, 0, 0), EngineError("broken")))
    back = event_from_plain(orjson.loads(orjson.dumps(event_to_plain(9, failed))))
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
        back = there_and_back(PastureError, error)
        assert type(back) is kind
        assert (str(back), vars(back)) == ("why", vars(error))


def test_statistics_of_a_service_that_works() -> None:
    engine = FakeEngine(PoolShape(512, 4))
    service = LocalService(engine, store_for(engine))
    try:
        found = service.statistics()
    finally:
        service.close()
    assert there_and_back(ServiceStatistics, found) == found


def test_what_has_no_plain_form_and_what_is_none() -> None:
    with pytest.raises(TypeError):
        to_plain(object())
    assert to_plain(array("i", [1, 2])) == [1, 2]
    wrongs: tuple[Any, ...] = (
        None,
        3,
        [],
        {"prompt": [1]},
        {"unknown": 1},
        {"prompt_tokens": "x", "cached_tokens": 0, "completion_tokens": 0},
    )
    for wrong in wrongs:
        with pytest.raises(ValueError, match="this is no Usage"):
            from_plain(Usage, wrong)
    with pytest.raises(ValueError, match="no error"):
        from_plain(PastureError, {"kind": "Mapping", "message": ""})
