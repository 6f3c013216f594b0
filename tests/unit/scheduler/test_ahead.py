"""Prompts computed ahead of time, and what happens when somebody asks meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pasture.core.values import DEFAULT_NAMESPACE, Outcome, PoolShape, Request, RequestId, SamplingParams
from pasture.engine.fake import FakeEngine, expected_reply
from pasture.kv.radix import token_array
from pasture.scheduler.scheduler import Scheduler
from pasture.scheduler.settings import SchedulerSettings
from pasture.scheduler.task import Task
from tests.store_support import still_store_for

PROMPT = tuple(range(200))
GREEDY = SamplingParams(temperature=0.0)


class Bench:
    """A scheduler driven by hand."""

    def __init__(self) -> None:
        self.engine = FakeEngine(PoolShape(1024, 8))
        self.store = still_store_for(self.engine, 1 << 20)
        self.scheduler = Scheduler(self.engine, SchedulerSettings(check_invariants=True), self.store, lambda: 0.0)
        self.reply: list[int] = []

    def step(self) -> bool:
        plan = self.scheduler.schedule()
        for _, event in self.scheduler.commit(plan, self.engine.execute(plan)):
            if event.token is not None:
                self.reply.append(event.token)
        return bool(plan.works)

    def ask(self, prompt: tuple[int, ...]) -> Task:
        task = Task(Request(RequestId("r"), prompt, 4, GREEDY), 0.0, lambda: False)
        self.scheduler.submit(task)
        return task

    def run(self) -> None:
        while self.step():
            pass


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.store.close()


def test_an_expected_prompt_is_computed_when_nobody_asks(bench: Bench) -> None:
    bench.scheduler.ahead.anticipate(DEFAULT_NAMESPACE, token_array(PROMPT))
    bench.run()
    assert bench.scheduler.statistics().ahead_tokens_total == len(PROMPT)
    assert bench.scheduler.pool.locked_cells == 0
    task = bench.ask((*PROMPT, 7, 8))
    bench.run()
    assert task.cached_tokens == len(PROMPT)
    assert bench.reply == expected_reply((*PROMPT, 7, 8), 4, GREEDY)


def test_a_request_goes_first_and_finds_what_was_computed_so_far(bench: Bench) -> None:
    bench.scheduler.ahead.anticipate(DEFAULT_NAMESPACE, token_array(PROMPT))
    bench.step()
    computed = bench.scheduler.ahead.computed_tokens
    assert 0 < computed < len(PROMPT)
    task = bench.ask((*PROMPT[:100], 7))
    bench.step()
    assert task.cached_tokens == min(computed, 100)
    bench.run()
    assert bench.reply == expected_reply((*PROMPT[:100], 7), 4, GREEDY)
    assert bench.scheduler.ahead.computed_tokens == len(PROMPT) - 100 + computed, "the rest, once there was time again"


def test_what_is_known_already_is_not_computed_again(bench: Bench) -> None:
    bench.ask(PROMPT)
    bench.run()
    bench.scheduler.ahead.anticipate(DEFAULT_NAMESPACE, token_array(PROMPT[:150]))
    bench.run()
    assert bench.scheduler.ahead.computed_tokens <= 1


def test_what_does_not_fit_is_not_begun(bench: Bench) -> None:
    bench.scheduler.ahead.anticipate(DEFAULT_NAMESPACE, token_array(i % 250 for i in range(2000)))
    bench.scheduler.ahead.anticipate(DEFAULT_NAMESPACE, token_array(()))
    assert not bench.step()


def test_a_failing_engine_ends_the_attempt_and_nothing_else(bench: Bench) -> None:
    bench.engine.fail_next(Outcome.FAILED)
    bench.scheduler.ahead.anticipate(DEFAULT_NAMESPACE, token_array(PROMPT))
    bench.run()
    assert not bench.scheduler.ahead.waiting
    bench.ask(PROMPT)
    bench.run()
    assert bench.reply == expected_reply(PROMPT, 4, GREEDY)
