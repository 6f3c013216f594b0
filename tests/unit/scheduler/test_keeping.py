"""What a conversation's owner asks of the engine thread: exports that are not what they claim, questions that fail."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from itertools import pairwise

import pytest

from pasture.core.errors import RequestError
from pasture.core.statistics import PrefixContent
from pasture.core.values import DEFAULT_NAMESPACE, PoolShape, Request, RequestId, SamplingParams
from pasture.engine.fake import Cell, FakeEngine, FakeSlab, expected_reply
from pasture.scheduler import keeping
from pasture.scheduler.loop import EngineLoop
from pasture.scheduler.scheduler import Scheduler
from pasture.scheduler.service import LocalService
from pasture.scheduler.settings import SchedulerSettings
from tests.store_support import store_for

GREEDY = SamplingParams(temperature=0.0)
PROMPT = tuple(range(200))


@contextlib.contextmanager
def served(engine: FakeEngine) -> Iterator[LocalService]:
    service = LocalService(engine, store_for(engine), SchedulerSettings(check_invariants=True))
    try:
        yield service
    finally:
        service.close()


async def answer_of(service: LocalService, prompt: tuple[int, ...]) -> list[int]:
    request = Request(RequestId(f"of {len(prompt)}"), prompt, 8, GREEDY)
    return [event.token async for event in service.generate(request) if event.token is not None]


def exported(engine: FakeEngine, *edges: int) -> bytes:
    """Slabs from each edge to the next, with checksums that are right."""
    slabs = [FakeSlab(p0, tuple(Cell(PROMPT[i], i, 0) for i in range(p0, p1))) for p0, p1 in pairwise(edges)]
    return keeping.pack(slabs, engine.codec)


@pytest.mark.parametrize(("edges", "recurrent"), [((0, 10, 100), False), ((0, 64, 100), True)])
async def test_an_export_with_impossible_parts_is_refused_and_the_server_goes_on(
    edges: tuple[int, ...], recurrent: bool
) -> None:
    engine = FakeEngine(PoolShape(1024, 8), recurrent=recurrent)
    with served(engine) as service:
        with pytest.raises(RequestError, match="the exported KV"):
            await service.restore(DEFAULT_NAMESPACE, PROMPT, exported(engine, *edges))
        assert await answer_of(service, (7, *PROMPT)) == expected_reply((7, *PROMPT), 8, GREEDY)


async def test_a_prefix_opens_with_what_it_says_and_how_much_of_it_rests_where(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(FakeEngine(PoolShape(1024, 8))) as service:
        for last in (5, 6):
            await answer_of(service, (*PROMPT, last, *range(40)))
        while len(prefixes := service.statistics().pool.prefixes) < 3:
            await service.live()
        head, tail = prefixes[0], prefixes[1]
        assert (head.n_tokens, tail.parent, tail.start) == (200, head.number, 200)
        monkeypatch.setattr(service._store, "held_by_slow", lambda *_: {"disk": 128, "far": 220})
        (await service.pin(DEFAULT_NAMESPACE, [*PROMPT, *tail.tokens])).release()
        whole, part = await service.open_prefix(head.number, 1000), await service.open_prefix(tail.number, 3)
        assert whole == PrefixContent(PROMPT, 200, 200, {"disk": 128, "far": 200})
        assert part == PrefixContent(tuple(tail.tokens[:3]), tail.n_tokens, tail.n_tokens, {"disk": 0, "far": 20})
        assert await service.open_prefix(head.number + 1000, 3) is None


async def test_a_pin_that_comes_too_late_for_who_asked_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(FakeEngine(PoolShape(1024, 8))) as service:
        asked, cancelled, released = threading.Event(), threading.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        class Pin:
            def release(self) -> None:
                loop.call_soon_threadsafe(released.set)

        def pin(*_: object) -> Pin:
            asked.set()
            cancelled.wait()
            return Pin()

        monkeypatch.setattr(service._store, "pin", pin)
        asking = asyncio.create_task(service.pin(DEFAULT_NAMESPACE, PROMPT))
        await asyncio.to_thread(asked.wait)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        cancelled.set()
        await asyncio.wait_for(released.wait(), 10)


def test_a_nudge_before_the_thread_sleeps_is_not_lost() -> None:
    engine = FakeEngine(PoolShape(1024, 8))
    store = store_for(engine)
    loop = EngineLoop(engine, SchedulerSettings(), store, lambda _: None)
    loop.nudge()
    resting = threading.Thread(target=loop._rest, daemon=True)
    resting.start()
    resting.join(10)
    assert not resting.is_alive()
    store.close()


async def test_a_question_that_fails_is_its_own_askers_alone() -> None:
    def question(scheduler: Scheduler) -> None:
        raise ValueError("no such thing")

    with served(FakeEngine(PoolShape(1024, 8))) as service:
        stream = service.generate(Request(RequestId("running"), PROMPT, 100, GREEDY))
        tokens = [(await anext(stream)).token]
        with pytest.raises(ValueError, match="no such thing"):
            await asyncio.wrap_future(service._loop.ask(question))
        tokens += [event.token async for event in stream if event.token is not None]
    assert tokens == expected_reply(PROMPT, 100, GREEDY)
