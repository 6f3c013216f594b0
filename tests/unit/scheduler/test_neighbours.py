"""A tenant that sends fifty times its share, in virtual time: what the others notice of it.

The fake engine computes the tokens; a step takes what it would on two cores (docs/architecture.md: with fewer than 64 rows each
row walks over its cells alone). Eight tenants send prompts at random moments, seven of them, and in one run all eight, no more
than their part of what the machine can do. Time passes in steps alone, so every run is the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

import pytest

from pasture.core.errors import QueueFull
from pasture.core.values import Allowance, Namespace, Outcome, PoolShape, Request, RequestId, SamplingParams
from pasture.engine.fake import FakeEngine
from pasture.scheduler.scheduler import Scheduler
from pasture.scheduler.service import LocalService
from pasture.scheduler.settings import SchedulerSettings
from pasture.scheduler.task import Task
from pasture.scheduler.usage import Usage
from tests.store_support import still_store_for

N_TENANTS = 8
PROMPT_TOKENS, REPLY_TOKENS = 200, 32
REQUEST_SECONDS = 1.35
"""of the machine, about"""
LOAD = 0.7
"""of its part of the machine, that each tenant asks for"""
SECONDS, SETTLED = 240.0, 30.0
MAX_CONNECTIONS = 300


def step_seconds(n_rows: int) -> float:
    if not n_rows:
        return 0.0
    return 0.005 + 0.017 * n_rows if n_rows < 64 else 0.02 + 0.0048 * n_rows


@dataclass
class Served:
    first_token_seconds: list[float]
    """of the seven, after everything has settled"""
    served: int
    """requests of the eighth"""

    @property
    def p95(self) -> float:
        return sorted(self.first_token_seconds)[int(0.95 * len(self.first_token_seconds))]


def arrivals(times: float, rng: Random) -> list[tuple[float, int]]:
    found = []
    for tenant in range(N_TENANTS):
        rate = LOAD / N_TENANTS / REQUEST_SECONDS * (times if tenant == 0 else 1.0)
        at = rng.expovariate(rate)
        while at < SECONDS:
            found.append((at, tenant))
            at += rng.expovariate(rate)
    return sorted(found)


def serve(times: float, itl_target_seconds: float = 0.4, *, interrupts: bool = True) -> Served:
    """`times`: its share, that tenant 0 sends. `interrupts`: who comes may interrupt a step, as in the loop."""
    rng, now = Random(1), 0.0
    engine = FakeEngine(PoolShape(32768, 128, tile_tokens=64))
    settings = SchedulerSettings(max_running=64, itl_target_seconds=itl_target_seconds)
    scheduler = Scheduler(engine, settings, still_store_for(engine, 1 << 28), lambda: now)
    coming, waiting, outcome = arrivals(times, rng), dict[RequestId, Task](), Served([], 0)
    while now < SECONDS:
        while coming and coming[0][0] <= now:
            at, tenant = coming.pop(0)
            if tenant == 0 and sum(task.request.tenant == "0" for task in waiting.values()) >= MAX_CONNECTIONS:
                continue
            task = Task(_request(len(coming), tenant, rng), at, lambda: False)
            waiting[task.request.request_id] = task
            scheduler.submit(task)
        plan = scheduler.schedule()
        if not plan.works:
            now = coming[0][0] if coming else SECONDS
            continue
        seconds = step_seconds(plan.n_tokens)
        in_peace = scheduler.in_peace if interrupts else None
        if in_peace is not None:
            sooner = next((at for at, tenant in coming if at < now + seconds and str(tenant) not in in_peace), None)
            if sooner is not None:
                engine.fail_next(Outcome.INTERRUPTED)
                seconds = sooner - now
        result = replace(engine.execute(plan), decode_seconds=seconds)
        now += seconds
        for task, event in scheduler.commit(plan, result):
            if event.token is not None and waiting.pop(task.request.request_id, None) is not None:
                if task.request.tenant == "0":
                    outcome.served += 1
                elif task.submitted_at > SETTLED:
                    outcome.first_token_seconds.append(now - task.submitted_at)
    return outcome


def _request(number: int, tenant: int, rng: Random) -> Request:
    prompt = (tenant, *(rng.randrange(250) for _ in range(PROMPT_TOKENS - 1)))
    name = str(tenant)
    return Request(
        RequestId(f"{name}-{number}"),
        prompt,
        REPLY_TOKENS,
        SamplingParams(temperature=0),
        namespace=Namespace(name),
        tenant=name,
        user=name,
        allowance=Allowance(),
    )


@pytest.mark.timeout(120)
def test_fifty_times_a_share_raises_the_others_first_token_p95_by_less_than_a_third() -> None:
    usual, greedy = serve(1.0), serve(50.0)
    assert len(greedy.first_token_seconds) > 60
    assert greedy.p95 <= 1.3 * usual.p95
    assert greedy.served > usual.served, "what the others leave is the greedy tenant's"


@pytest.mark.timeout(120)
def test_without_an_account_of_what_was_used_they_would_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pasture.scheduler.usage.Usage.charge", lambda self, rows, seconds: None)
    usual, greedy = serve(1.0), serve(50.0)
    assert greedy.p95 > 2 * usual.p95


@pytest.mark.timeout(120)
def test_who_seldom_asks_does_not_come_into_a_long_step_of_who_always_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.unit.scheduler.test_neighbours.LOAD", 0.15)
    remembered = serve(150.0)
    monkeypatch.setattr("pasture.scheduler.usage.Usage.lately", lambda self: set())
    forgotten = serve(150.0)
    assert remembered.p95 < 0.9 * forgotten.p95
    assert remembered.served > 0.9 * forgotten.served


@pytest.mark.timeout(120)
def test_who_comes_finds_short_steps_of_who_used_much_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.unit.scheduler.test_neighbours.LOAD", 0.15)
    short = serve(150.0, itl_target_seconds=0.8, interrupts=False)
    monkeypatch.setattr("pasture.scheduler.usage.Usage.is_much", lambda self, task: False)
    long = serve(150.0, itl_target_seconds=0.8, interrupts=False)
    assert sum(short.first_token_seconds) < 0.95 * sum(long.first_token_seconds)
    assert short.served > 0.9 * long.served


@pytest.mark.timeout(120)
def test_who_comes_interrupts_a_step_of_who_used_much_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.unit.scheduler.test_neighbours.LOAD", 0.15)
    interrupted, waited_for = serve(150.0), serve(150.0, interrupts=False)
    assert sum(interrupted.first_token_seconds) < 0.9 * sum(waited_for.first_token_seconds)
    assert interrupted.served > 0.9 * waited_for.served


def test_heavy_are_those_who_would_not_go_first() -> None:
    usage = Usage(lambda: 60.0)
    one, half, little = (Task(_request(0, tenant, Random(0)), 0.0, lambda: False) for tenant in range(3))
    for task, seconds in ((one, 20.0), (half, 10.5), (little, 9.5)):
        usage.charge([(task, 64)], seconds)
    assert usage.heavy(one) == {"0", "1"}
    assert usage.heavy(little) == {"0", "1", "2"}


def test_much_is_much_more_than_another_has_used_lately_by_weight() -> None:
    now = 0.0
    usage = Usage(lambda: now)
    busy, calm = (Task(_request(number, number, Random(number)), 0.0, lambda: False) for number in (1, 2))
    usage.charge([(busy, 64)], 30.0)
    assert not usage.is_much(busy), "of one alone"
    now = 60.0
    usage.charge([(calm, 64)], 5.0)
    assert usage.is_much(busy)
    assert not usage.is_much(calm)
    heavy = Task(replace(busy.request, allowance=Allowance(weight=20.0)), 0.0, lambda: False)
    assert not usage.is_much(heavy)
    now = 600.0
    usage.charge([(busy, 64)], 30.0)
    assert not usage.is_much(busy), "the other has not been there for long"


async def test_a_line_that_one_tenant_has_filled_has_a_place_for_another() -> None:
    engine = FakeEngine(PoolShape(2000, 4))
    service = LocalService(engine, still_store_for(engine, 1 << 20), SchedulerSettings(max_waiting=4))
    service.close()  # nothing starts any more: everybody stays in line
    for number in range(4):
        task = Task(_request(number, 1, Random(number)), 0.0, lambda: False)
        service._channels[task] = None  # type: ignore[assignment]
    assert service._is_full_for("1")
    assert not service._is_full_for("2")
    service._draining = False
    with pytest.raises(QueueFull):
        service._admit(_request(9, 1, Random(9)))
