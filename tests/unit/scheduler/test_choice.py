"""Who computes prompt tokens next, and how many prompts share a step."""

from __future__ import annotations

import pytest

from pasture.core.values import Layout, PoolShape, Request, RequestId, SamplingParams
from pasture.engine.fake import FakeEngine
from pasture.kv.pool import Pool
from pasture.scheduler.admission import Admission
from pasture.scheduler.resting import Resting
from pasture.scheduler.scheduler import Scheduler
from pasture.scheduler.settings import SchedulerSettings
from pasture.scheduler.task import Task
from pasture.scheduler.usage import Usage
from tests.store_support import store_for


def task(name: str, n_tokens: int, submitted_at: float = 0.0) -> Task:
    prompt = tuple(i % 250 for i in range(len(name), len(name) + n_tokens))
    request = Request(RequestId(name), prompt, 8, SamplingParams(), user=name)
    return Task(request, submitted_at, lambda: False)


@pytest.mark.parametrize(
    ("now", "first"),
    [(0.0, "short"), (50.0, "short"), (100.0, "long"), (130.0, "long")],
    ids=["at once", "a while later", "when it has waited long", "past the age bound"],
)
def test_the_shortest_prompt_goes_first_until_a_longer_one_has_waited(now: float, first: str) -> None:
    clock = [now]
    settings = SchedulerSettings(age_bound_seconds=120.0)
    engine = FakeEngine(PoolShape(4096, 8))
    pool = Pool(engine.shape, clock=lambda: clock[0])
    resting = Resting(pool, store_for(engine), engine.codec, lambda: clock[0], SchedulerSettings(), lambda: None)
    admission = Admission(pool, resting, settings, lambda: clock[0])
    long, short = task("long", 400, submitted_at=0.0), task("short", 100, submitted_at=now)
    chosen = admission.choose([long, short])
    assert chosen is not None
    assert chosen.request.request_id == first


@pytest.mark.parametrize(("layout", "prompts"), [(Layout.STREAMS, 1), (Layout.UNIFIED, 2)])
def test_in_streams_a_step_takes_one_prompt_only(layout: Layout, prompts: int) -> None:
    engine = FakeEngine(PoolShape(4096, 4, layout, tile_tokens=64))
    scheduler = Scheduler(engine, SchedulerSettings(itl_target_seconds=10.0), store_for(engine), lambda: 0.0)
    scheduler.submit(task("a", 40))
    scheduler.submit(task("bbb", 40))
    assert len(scheduler.schedule().works) == prompts


def test_in_streams_no_rest_shorter_than_a_tile_is_left() -> None:
    engine = FakeEngine(PoolShape(4096, 4, Layout.STREAMS, tile_tokens=64))
    scheduler = Scheduler(engine, SchedulerSettings(itl_target_seconds=0.01), store_for(engine), lambda: 0.0)
    scheduler.submit(task("a", 100))
    (work,) = scheduler.schedule().works
    assert len(work.tokens) == 100


@pytest.mark.parametrize(("prompt", "chunk"), [(100, 65), (97, 97)])
def test_in_a_short_step_a_rest_of_half_a_tile_is_left(monkeypatch: pytest.MonkeyPatch, prompt: int, chunk: int) -> None:
    monkeypatch.setattr(Usage, "is_much", lambda self, task: True)
    engine = FakeEngine(PoolShape(4096, 4, Layout.STREAMS, tile_tokens=64, can_pad=True))
    scheduler = Scheduler(engine, SchedulerSettings(itl_target_seconds=0.01), store_for(engine), lambda: 0.0)
    scheduler.submit(task("a", prompt))
    (work,) = scheduler.schedule().works
    assert len(work.tokens) == chunk
