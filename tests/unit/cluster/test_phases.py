"""What a request spent its time with, told by replicas and put together by the story of the whole reply."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import replace

import pytest

from pasture.cluster.survival import Story
from pasture.core.errors import DeadlineExceeded
from pasture.core.ports import Service
from pasture.core.values import Finish, FinishReason, Phase, PhaseKind, Request, RequestId, TokenEvent, Usage
from tests.cluster_support import GREEDY, fleet, until
from tests.held_engine import HeldEngine

ASKED = Request(RequestId("r"), tuple(range(40)), 6, GREEDY, traced=True)


async def test_phases_come_through_a_replica() -> None:
    async with fleet() as made:
        finish = [event async for event in made.service.generate(ASKED)][-1].finish
        untraced = [event async for event in made.service.generate(replace(ASKED, traced=False))][-1].finish
    assert finish is not None
    assert untraced is not None
    kinds = [phase.kind for phase in finish.usage.phases]
    assert (kinds[0], kinds[-1]) == (PhaseKind.QUEUE, PhaseKind.DECODE)
    assert untraced.usage.phases == ()


async def first_event(service: Service, request: Request, heard: list[Usage]) -> object:
    async with aclosing(service.generate(request, heard.append)) as events:
        return await anext(events)


async def test_phases_of_who_has_left_come_from_the_replica() -> None:
    engine, heard = HeldEngine(), list[Usage]()
    async with fleet(engine) as made:
        reading = asyncio.create_task(first_event(made.service, ASKED, heard))
        assert await asyncio.to_thread(engine.held.wait, 10)
        reading.cancel()
        await asyncio.wait([reading])
        await asyncio.sleep(0.1)
        assert heard == [], "the step is under way"
        engine.go_on.set()
        await until(lambda: heard)
    assert [[phase.kind for phase in usage.phases] for usage in heard] == [[PhaseKind.QUEUE, PhaseKind.PREFILL]]


async def test_phases_of_who_ends_with_an_error_come_before_it() -> None:
    heard: list[Usage] = []
    async with fleet() as made:
        with pytest.raises(DeadlineExceeded):
            await first_event(made.service, replace(ASKED, deadline_seconds=0.0), heard)
    assert [[phase.kind for phase in usage.phases] for usage in heard] == [[PhaseKind.QUEUE]]


async def test_who_leaves_a_replica_that_is_lost_is_told_what_is_known() -> None:
    engine, heard = HeldEngine(), list[Usage]()
    async with fleet(engine) as made:
        begun = time.monotonic()
        reading = asyncio.create_task(first_event(made.service, ASKED, heard))
        assert await asyncio.to_thread(engine.held.wait, 10)
        reading.cancel()
        await asyncio.wait([reading])
        took = time.monotonic() - begun
        await asyncio.sleep(0.3)
        await made.replicas["r0"].server.stop()
        await until(lambda: heard)
        engine.go_on.set()
    assert [[phase.kind for phase in usage.phases] for usage in heard] == [[PhaseKind.QUEUE]]
    assert heard[0].total_seconds == heard[0].phases[0].end_seconds < took + 0.2, (
        "until its reader left, not until that is known"
    )


async def test_who_leaves_while_there_is_no_replica_has_waited() -> None:
    heard: list[Usage] = []
    async with fleet() as made:
        for replica in made.replicas.values():
            await replica.server.stop()
            await made.register.leave(replica.member.replica, replica.member.epoch)
        await made.settled(0)
        reading = asyncio.create_task(first_event(made.service, ASKED, heard))
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])
    assert [[phase.kind for phase in usage.phases] for usage in heard] == [[PhaseKind.QUEUE]]


def test_the_phases_of_a_second_leg_follow_on_those_of_the_first() -> None:
    story = Story(ASKED, 10.0)
    story.next_leg(10.0)
    first = Usage(40, 0, 1, phases=(Phase(PhaseKind.QUEUE, 0.0, 0.5, 0), Phase(PhaseKind.PREFILL, 0.5, 1.0, 40)))
    story.told(TokenEvent(7, usage=first), 11.0)
    story.next_leg(13.0)  # its replica was lost
    second = Usage(41, 0, 5, phases=(Phase(PhaseKind.QUEUE, 0.0, 0.25, 0), Phase(PhaseKind.DECODE, 0.25, 1.0, 5)))
    told = story.told(TokenEvent(None, finish=Finish(FinishReason.LENGTH, second)), 14.0)
    assert told.finish is not None
    assert [(phase.kind, phase.start_seconds, phase.end_seconds) for phase in told.finish.usage.phases] == [
        (PhaseKind.QUEUE, 0.0, 0.5),
        (PhaseKind.PREFILL, 0.5, 1.0),
        (PhaseKind.QUEUE, 3.0, 3.25),
        (PhaseKind.DECODE, 3.25, 4.0),
    ]
