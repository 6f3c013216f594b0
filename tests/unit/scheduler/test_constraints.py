"""Constraints through the service, over the fake engine: replies that suit them, their ends, and refusals that hurt nobody."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import replace

import pytest

from pasture.core.errors import RequestError
from pasture.core.values import (
    Constraint,
    ConstraintKind,
    Finish,
    FinishReason,
    PoolShape,
    Request,
    RequestId,
    SamplingParams,
)
from pasture.engine.fake import END_TOKEN, FakeEngine, FakeVocabulary, expected_reply
from pasture.scheduler.service import LocalService
from pasture.scheduler.settings import SchedulerSettings
from tests.store_support import store_for

SHAPE = PoolShape(4096, 8)
PROMPT = tuple(b"Where is it?")
FORM = Constraint(
    ConstraintKind.JSON_SCHEMA,
    json.dumps({"type": "object", "properties": {"found": {"type": "boolean"}}, "required": ["found"]}),
    "response_format",
)


class Served:
    """A service for the length of a test."""

    def __init__(self, engine: FakeEngine) -> None:
        self.service = LocalService(engine, store_for(engine), SchedulerSettings(check_invariants=True))

    async def __aenter__(self) -> LocalService:
        return self.service

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.service.close)


def bound(constraint: Constraint | None = FORM, max_tokens: int = 400, **sampling: object) -> Request:
    params = SamplingParams(constraint=constraint, **sampling)  # type: ignore[arg-type]
    return Request(RequestId(f"bound-{id(params)}"), PROMPT, max_tokens, params, stop_tokens=frozenset({END_TOKEN}))


async def reply_of(service: LocalService, request: Request) -> tuple[list[int], Finish]:
    tokens: list[int] = []
    async for event in service.generate(request):
        if event.token is not None:
            tokens.append(event.token)
        if event.finish is not None:
            return tokens, event.finish
    raise AssertionError("a stream without an end")


def text_of(tokens: list[int]) -> str:
    return b"".join(FakeVocabulary().piece(token) for token in tokens).decode()


@pytest.mark.parametrize("seed", range(4))
async def test_a_reply_suits_its_schema_and_ends_with_it(seed: int) -> None:
    closed = replace(FORM, text=FORM.text.replace('"type": "object"', '"type": "object", "additionalProperties": false'))
    async with Served(FakeEngine(SHAPE)) as service:
        tokens, finish = await reply_of(service, bound(closed, seed=seed))
    assert isinstance(json.loads(text_of(tokens))["found"], bool)
    assert finish.reason is FinishReason.STOP
    assert finish.usage.completion_tokens == len(tokens)


async def test_a_reply_that_ends_with_its_last_token_allowed_has_stopped() -> None:
    async with Served(FakeEngine(SHAPE)) as service:
        tokens, finish = await reply_of(service, bound(Constraint(ConstraintKind.REGEX, "a"), max_tokens=1))
        assert (text_of(tokens), finish.reason) == ("a", FinishReason.STOP)
        _, finish = await reply_of(service, bound(Constraint(ConstraintKind.REGEX, "ab[cd]"), max_tokens=1))
        assert finish.reason is FinishReason.LENGTH


async def test_neighbours_write_what_they_would_write_alone() -> None:
    free = Request(RequestId("free"), PROMPT, 20, SamplingParams(temperature=0))
    async with Served(FakeEngine(SHAPE)) as service:
        (tokens, _), _ = await asyncio.gather(reply_of(service, free), reply_of(service, bound(seed=1)))
    assert tokens == expected_reply(PROMPT, 20, free.sampling)


async def test_another_engine_goes_on_where_one_was_lost() -> None:
    whole = bound(Constraint(ConstraintKind.REGEX, "[a-z]{12}"), seed=7)
    async with Served(FakeEngine(SHAPE)) as service:
        tokens, _ = await reply_of(service, whole)
    rest = replace(whole, prompt=(*PROMPT, *tokens[:5]), max_tokens=whole.max_tokens - 5, drawn_tokens=5)
    async with Served(FakeEngine(SHAPE)) as service:
        assert tokens[5:] == (await reply_of(service, rest))[0]


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (bound(replace(FORM, text='{"type": "colour"}')), "response_format"),
        (replace(bound(), stop_tokens=frozenset()), "ignore_eos"),
        (
            bound(Constraint(ConstraintKind.REGEX, "a", "guided_regex"), logit_bias=dict.fromkeys(range(512), -1000.0)),
            "guided_regex",
        ),
    ],
)
async def test_what_cannot_be_done_is_refused_and_leaves_nothing(request_: Request, param: str) -> None:
    async with Served(FakeEngine(SHAPE)) as service:
        with pytest.raises(RequestError) as caught:
            await reply_of(service, request_)
        assert caught.value.param == param
        assert (await reply_of(service, bound(seed=1)))[1].reason is FinishReason.STOP
        await service.verify()


async def test_nobody_waits_for_a_constraint_that_is_being_compiled() -> None:
    compiling, done = threading.Event(), threading.Event()

    class Slow(FakeEngine):
        def prepare(self, constraint: Constraint) -> object:
            compiling.set()
            done.wait(60)
            return super().prepare(constraint)

    async with Served(Slow(SHAPE)) as service:
        waiting = asyncio.create_task(reply_of(service, bound(seed=2)))
        await asyncio.to_thread(compiling.wait, 60)
        await reply_of(service, bound(None, max_tokens=5))
        assert not waiting.done()
        done.set()
        assert (await waiting)[1].reason is FinishReason.STOP
