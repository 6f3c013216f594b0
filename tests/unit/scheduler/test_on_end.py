"""What a request had cost is heard of when nobody gets its last event: its reader has left, or it ended with an error."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest

from pasture.core.errors import DeadlineExceeded, QueueFull
from pasture.core.values import Constraint, ConstraintKind, PhaseKind, Request, RequestId, SamplingParams, Usage
from pasture.engine.fake import END_TOKEN, FakeEngine
from pasture.scheduler.service import LocalService
from pasture.scheduler.settings import SchedulerSettings
from tests.cluster_support import until
from tests.held_engine import HeldEngine
from tests.store_support import store_for

ASKED = Request(RequestId("r"), tuple(range(40)), 6, SamplingParams(temperature=0), traced=True)


@contextlib.asynccontextmanager
async def served(engine: FakeEngine, **options: object) -> AsyncGenerator[LocalService, None]:
    settings = SchedulerSettings(check_invariants=True, **options)  # type: ignore[arg-type]
    service = LocalService(engine, store_for(engine), settings)
    try:
        yield service
    finally:
        await asyncio.to_thread(service.close)


def kinds(usage: Usage) -> list[PhaseKind]:
    return [phase.kind for phase in usage.phases]


async def left(task: asyncio.Task[object]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def begun(service: LocalService, request: Request, heard: list[Usage]) -> asyncio.Task[object]:
    """Somebody waits for the request's first event."""

    async def first() -> object:
        async with contextlib.aclosing(service.generate(request, heard.append)) as events:
            return await anext(events)

    task: asyncio.Task[object] = asyncio.create_task(first())
    await asyncio.sleep(0)  # as far as to its channel
    return task


async def test_a_reader_who_leaves_the_line_has_waited() -> None:
    engine, heard = HeldEngine(), list[Usage]()
    async with served(engine, max_running=1) as service:
        running = await begun(service, replace(ASKED, request_id=RequestId("first")), [])
        assert await asyncio.to_thread(engine.held.wait, 10)
        await left(await begun(service, ASKED, heard))
        assert heard == [], "the step is under way"
        engine.go_on.set()
        await until(lambda: heard)
        await running
    assert [kinds(usage) for usage in heard] == [[PhaseKind.QUEUE]]


async def test_a_reader_who_leaves_before_the_first_token_has_what_was_computed() -> None:
    engine, heard = HeldEngine(), list[Usage]()
    async with served(engine) as service:
        reading = await begun(service, replace(ASKED, prompt=tuple(i % 250 for i in range(3000))), heard)
        assert await asyncio.to_thread(engine.held.wait, 10)
        await left(reading)
        engine.go_on.set()
        await until(lambda: heard)
    assert kinds(heard[0])[:2] == [PhaseKind.QUEUE, PhaseKind.PREFILL]
    assert len(heard) == 1


async def test_an_end_that_nobody_read_is_heard_of() -> None:
    heard: list[Usage] = []
    async with served(FakeEngine(HeldEngine().shape)) as service:
        events = service.generate(ASKED, heard.append)
        await anext(events)
        await until(lambda: service.statistics().scheduler.finished_total.get("length"))
        await asyncio.sleep(0)  # the last events have come
        await events.aclose()
        await until(lambda: heard)
    assert [usage.completion_tokens for usage in heard] == [6]


async def test_an_end_that_was_read_is_not_told_again() -> None:
    heard: list[Usage] = []
    async with served(HeldEngine(100)) as service:
        assert [event async for event in service.generate(ASKED, heard.append)][-1].finish is not None
    assert heard == []


async def test_who_ends_with_an_error_in_line_is_heard_of_before_it() -> None:
    heard: list[Usage] = []
    async with served(HeldEngine(100)) as service:
        with pytest.raises(DeadlineExceeded):
            await anext(service.generate(replace(ASKED, deadline_seconds=0.0), heard.append))
        assert [kinds(usage) for usage in heard] == [[PhaseKind.QUEUE]]


async def test_who_is_refused_at_the_door_has_cost_nothing() -> None:
    heard: list[Usage] = []
    async with served(HeldEngine(100), max_waiting=0) as service:
        with pytest.raises(QueueFull):
            await anext(service.generate(ASKED, heard.append))
    assert heard == []


async def test_a_reader_who_leaves_before_the_constraint_is_ready_has_waited() -> None:
    class Slow(FakeEngine):
        ready = threading.Event()

        def prepare(self, constraint: Constraint) -> object:
            self.ready.wait(10)
            return super().prepare(constraint)

    heard: list[Usage] = []
    sampling = SamplingParams(constraint=Constraint(ConstraintKind.REGEX, "a+", "guided_regex"))
    async with served(Slow(HeldEngine().shape)) as service:
        asked = replace(ASKED, sampling=sampling, stop_tokens=frozenset({END_TOKEN}))
        await left(await begun(service, asked, heard))
        Slow.ready.set()
        assert [kinds(usage) for usage in heard] == [[PhaseKind.QUEUE]]


async def test_a_service_that_ends_tells_of_who_has_left_too() -> None:
    engine, heard = HeldEngine(), list[Usage]()
    async with served(engine) as service:
        reading = await begun(service, ASKED, heard)
        assert await asyncio.to_thread(engine.held.wait, 10)
        await left(reading)
        closing = asyncio.create_task(asyncio.to_thread(service.close))
        engine.go_on.set()
        await closing
        await until(lambda: heard)
    assert kinds(heard[0])[0] is PhaseKind.QUEUE
