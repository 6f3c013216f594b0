"""Where prompts part, for models whose state cannot be cut."""

from __future__ import annotations

import asyncio

from pasture.core.values import PoolShape, Request, RequestId, SamplingParams
from pasture.engine.fake import FakeEngine, expected_reply
from pasture.scheduler.service import LocalService
from pasture.scheduler.settings import SchedulerSettings
from tests.store_support import store_for

HEAD = tuple(range(150))
GREEDY = SamplingParams(temperature=0.0)


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
