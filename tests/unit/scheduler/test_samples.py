"""What was restored is what was stored, or somebody says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest

from pasture.core.statistics import Verification
from pasture.core.values import Form, Namespace, PoolShape, Request, RequestId, SamplingParams
from pasture.engine.fake import FakeEngine
from pasture.kv.radix import token_array
from pasture.scheduler.samples import MAX_SAMPLES, SAMPLE_TOKENS
from pasture.scheduler.scheduler import Scheduler
from pasture.scheduler.service import LocalService
from pasture.scheduler.settings import SchedulerSettings
from tests.store_support import store_for

PROMPT = tuple(range(200))
ONE = Verification(SAMPLE_TOKENS, 0)


class Server:
    """A service over the fake engine."""

    def __init__(self) -> None:
        self.engine = FakeEngine(PoolShape(4096, 32))
        self.service = LocalService(self.engine, store_for(self.engine), SchedulerSettings(check_invariants=True))
        self._n_asked = 0

    async def ask(self, prompt: tuple[int, ...]) -> int:
        """Returns how many tokens were found."""
        self._n_asked += 1
        request = Request(RequestId(f"r{self._n_asked}"), prompt, 2, SamplingParams(temperature=0.0), Namespace("tests"))
        cached = 0
        async for event in self.service.generate(request):
            cached = cached if event.finish is None else event.finish.usage.cached_tokens
        return cached

    async def restored(self, *prompts: tuple[int, ...]) -> None:
        """Have these computed, evicted, and brought back."""
        for prompt in prompts:
            await self.ask(prompt)
        await self.evict()
        for prompt in prompts:
            assert await self.ask(prompt) > 100

    async def evict(self) -> None:
        """Have all that is idle leave the live cache."""
        await self.service._ask(lambda scheduler: scheduler.pool.evict_idle("tests"))

    def close(self) -> None:
        self.service.close()


@pytest.fixture
def server() -> Iterator[Server]:
    with closing(Server()) as made:
        yield made


async def test_what_was_restored_is_read_back_as_often_as_anybody_asks(server: Server) -> None:
    assert await server.service.verify() == Verification()
    await server.restored(PROMPT)
    assert await server.service.verify() == ONE
    assert await server.service.verify() == ONE
    await server.evict()
    assert await server.service.verify() == Verification()


async def test_cells_that_are_not_what_was_stored_are_told(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    await server.restored(PROMPT)

    def damage(_: Scheduler) -> None:
        for cells in server.engine._cells.values():
            cells[:] = [replace(cell, mark=cell.mark ^ 1) for cell in cells]

    await server.service._ask(damage)
    assert await server.service.verify() == Verification(SAMPLE_TOKENS, SAMPLE_TOKENS)
    assert "is not what was restored there" in caplog.text


async def test_a_sequence_that_was_cut_back_is_not_compared(server: Server) -> None:
    await server.restored(PROMPT)

    def cut(scheduler: Scheduler) -> None:
        pool = scheduler.pool
        match = pool.tree.match(Namespace("tests"), token_array(PROMPT))
        (sequence,) = match.node.holders
        pool.cut_back(sequence, pool.tree.split(match.node, 3), "tests")

    await server.service._ask(cut)
    assert await server.service.verify() == Verification()


async def test_cells_in_another_form_are_not_compared(server: Server) -> None:
    await server.restored(PROMPT)

    def there_and_back(_: Scheduler) -> None:
        for form in (Form.Q8_0, Form.RAW):
            server.service._loop._keeper.rewrite(form)

    await server.service._ask(there_and_back)
    assert await server.service.verify() == Verification()


async def test_a_few_are_enough(server: Server) -> None:
    await server.restored(*((number, *PROMPT) for number in range(MAX_SAMPLES + 3)))
    assert await server.service.verify() == Verification(MAX_SAMPLES * SAMPLE_TOKENS, 0)
