"""What a request spent its time with, told by replicas and put together by the story of the whole reply."""

from __future__ import annotations

from dataclasses import replace

from pasture.cluster.survival import Story
from pasture.core.values import Finish, FinishReason, Phase, PhaseKind, Request, RequestId, TokenEvent, Usage
from tests.cluster_support import GREEDY, fleet

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
