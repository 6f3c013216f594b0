"""Where prompts part, for models whose state cannot be cut."""

from __future__ import annotations

import asyncio

from pasture.core.values import DEFAULT_NAMESPACE, Namespace, PoolShape, Request, RequestId, SamplingParams
from pasture.engine.fake import FakeEngine, expected_reply
from pasture.kv.radix import token_array
from pasture.scheduler.branches import Branches
from pasture.scheduler.service import LocalService
from pasture.scheduler.settings import SchedulerSettings
from tests.store_support import store_for

HEAD = tuple(range(150))
GREEDY = SamplingParams(temperature=0.0)


def test_two_prompts_part_at_the_end_of_a_block() -> None:
    branches = Branches()
    prompts = [token_array((*HEAD, *[200 + i] * 60)) for i in range(3)]
    assert [branches.part(DEFAULT_NAMESPACE, prompt) for prompt in prompts] == [0, 128, 128]
    assert branches.part(DEFAULT_NAMESPACE, prompts[0]) == 192
    assert branches.part(Namespace("others"), prompts[0]) == 0
    assert branches.part(DEFAULT_NAMESPACE, prompts[0][:63]) == 0


def test_what_is_remembered_is_bounded() -> None:
    branches = Branches(remembered=4)
    for first in range(100):
        branches.part(DEFAULT_NAMESPACE, token_array([first] * 128))
    assert len(branches._seen) == 4
    assert branches.part(DEFAULT_NAMESPACE, token_array([99] * 128)) == 128


async def test_a_state_that_cannot_be_cut_is_shared_by_people_who_come_long_after_each_other() -> None:
    engine = FakeEngine(PoolShape(4096, 4), recurrent=True)
    service = LocalService(engine, store_for(engine), SchedulerSettings(idle_live_seconds=0.0))
    cached = []
    for number in range(3):
        prompt = (*HEAD, *[200 + number] * 20)
        request = Request(RequestId(f"r{number}"), prompt, 4, GREEDY)
        events = [event async for event in service.generate(request)]
        finish = events[-1].finish
        assert finish is not None
        assert [event.token for event in events if event.token is not None] == expected_reply(prompt, 4, GREEDY)
        cached.append(finish.usage.cached_tokens)
        async with asyncio.timeout(10):
            while service.statistics().pool.used_cells:
                await asyncio.sleep(0.01)
                await service.verify()
    await asyncio.to_thread(service.close)
    assert cached == [0, 0, 128]
