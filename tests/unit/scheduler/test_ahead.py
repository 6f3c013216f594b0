"""Prompts computed ahead of time, and what happens when somebody asks meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pasture.core.values import DEFAULT_NAMESPACE, Layout, Namespace, Outcome, PoolShape, Request, RequestId, SamplingParams
from pasture.engine.fake import FakeEngine, expected_reply
from pasture.kv.radix import token_array
from pasture.scheduler.ahead import MAX_ANTICIPATED, MAX_TYPING_SECONDS
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
        self.now = 0.0
        self.store = still_store_for(self.engine, 1 << 20)
        self.scheduler = Scheduler(self.engine, SchedulerSettings(check_invariants=True), self.store, lambda: self.now)
        self.reply: list[int] = []

    def step(self) -> bool:
        plan = self.scheduler.schedule()
        for _, event in self.scheduler.commit(plan, self.engine.execute(plan)):
            if event.token is not None:
                self.reply.append(event.token)
        return bool(plan.works)

    def ask(self, prompt: tuple[int, ...], namespace: Namespace = DEFAULT_NAMESPACE) -> Task:
        task = Task(Request(RequestId("r"), prompt, 4, GREEDY, namespace=namespace), 0.0, lambda: False)
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


def test_what_does_not_fit_into_a_stream_any_more_is_not_begun(bench: Bench) -> None:
    bench.ask(PROMPT)
    bench.run()
    bench.scheduler.ahead.anticipate(DEFAULT_NAMESPACE, token_array((*PROMPT, 1, 2, *PROMPT)))
    bench.scheduler.pool.evict_idle("cells")
    bench.scheduler.pool.operations()
    bench.scheduler.pool.rebuilt(bench.engine.rebuild((), Layout.STREAMS, 4))
    assert not bench.step()
    assert not bench.scheduler.ahead.waiting


def test_a_failing_engine_ends_the_attempt_and_nothing_else(bench: Bench) -> None:
    bench.engine.fail_next(Outcome.FAILED)
    bench.scheduler.ahead.anticipate(DEFAULT_NAMESPACE, token_array(PROMPT))
    bench.run()
    assert not bench.scheduler.ahead.waiting
    bench.ask(PROMPT)
    bench.run()
    assert bench.reply == expected_reply(PROMPT, 4, GREEDY)


def test_what_was_interrupted_goes_on_when_nobody_asks_any_more(bench: Bench) -> None:
    bench.scheduler.ahead.anticipate(DEFAULT_NAMESPACE, token_array(PROMPT))
    assert bench.step()
    bench.engine.fail_next(Outcome.INTERRUPTED)
    bench.run()
    assert bench.scheduler.ahead.computed_tokens == len(PROMPT)
    assert not bench.scheduler.ahead.waiting


def test_a_growing_draft_replaces_itself_and_leaves_nothing_beside_it(bench: Bench) -> None:
    for n_tokens in (150, 155, 163, 170):
        bench.scheduler.ahead.anticipate(DEFAULT_NAMESPACE, token_array(PROMPT[:n_tokens]), typing=True)
    assert bench.step()
    bench.run()
    for n_tokens in (175, 190):
        bench.scheduler.ahead.anticipate(DEFAULT_NAMESPACE, token_array(PROMPT[:n_tokens]), typing=True)
        bench.run()
    assert bench.scheduler.ahead.computed_tokens == 190
    assert len(bench.scheduler.pool.sequences) == 1
    task = bench.ask(PROMPT)
    bench.run()
    assert task.cached_tokens == 190
    assert bench.reply == expected_reply(PROMPT, 4, GREEDY)


def test_less_than_a_tile_is_computed_in_small_pieces(bench: Bench) -> None:
    bench.scheduler.ahead.anticipate(DEFAULT_NAMESPACE, token_array(PROMPT[:100]))
    pieces = []
    before = 0
    while bench.step():
        pieces.append(bench.scheduler.ahead.computed_tokens - before)
        before += pieces[-1]
    assert pieces == [64, 16, 16, 4]


def test_what_is_typed_is_computed_even_when_little_is_missing(bench: Bench) -> None:
    bench.ask(PROMPT[:100])
    bench.run()
    bench.scheduler.ahead.anticipate(DEFAULT_NAMESPACE, token_array(PROMPT[:104]))
    bench.run()
    assert bench.scheduler.ahead.computed_tokens == 0
    bench.scheduler.ahead.anticipate(DEFAULT_NAMESPACE, token_array(PROMPT[:104]), typing=True)
    bench.run()
    assert bench.scheduler.ahead.computed_tokens == 4
    bench.scheduler.ahead.anticipate(DEFAULT_NAMESPACE, token_array(PROMPT[:105]), typing=True)
    bench.run()
    assert bench.scheduler.ahead.computed_tokens == 5


def test_a_prompt_that_did_not_come_is_forgotten(bench: Bench) -> None:
    bench.scheduler.ahead.anticipate(DEFAULT_NAMESPACE, token_array(PROMPT), typing=True)
    bench.now += MAX_TYPING_SECONDS + 1
    assert not bench.step()
    assert not bench.scheduler.ahead.waiting


def test_when_there_are_too_many_the_oldest_of_whoever_has_most_goes(bench: Bench) -> None:
    ahead = bench.scheduler.ahead
    ahead.anticipate(Namespace("modest"), token_array(PROMPT))
    for number in range(MAX_ANTICIPATED + 5):
        ahead.anticipate(DEFAULT_NAMESPACE, token_array([number, *PROMPT]))
    bench.run()
    bench.scheduler.pool.check()
    task = bench.ask(PROMPT, Namespace("modest"))
    bench.run()
    assert task.cached_tokens == len(PROMPT) - 1
