"""Prompts computed ahead of time, and what happens when somebody asks meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pasture.core.values import (
    DEFAULT_NAMESPACE,
    Allowance,
    Layout,
    Namespace,
    Outcome,
    PoolShape,
    Request,
    RequestId,
    SamplingParams,
)
from pasture.engine.fake import FakeEngine, expected_reply
from pasture.kv.radix import token_array
from pasture.scheduler.ahead import MAX_ANTICIPATED, MAX_LIFTED, MAX_TYPING_SECONDS
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
        self.n_asked = 0

    def step(self) -> bool:
        plan = self.scheduler.schedule()
        for _, event in self.scheduler.commit(plan, self.engine.execute(plan)):
            if event.token is not None:
                self.reply.append(event.token)
        return bool(plan.works)

    def ask(self, prompt: tuple[int, ...], namespace: Namespace = DEFAULT_NAMESPACE, user: str = "", n: int = 4) -> Task:
        self.n_asked += 1
        request = Request(RequestId(f"r{self.n_asked}"), prompt, n, GREEDY, namespace=namespace, user=user)
        task = Task(request, 0.0, lambda: False)
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


class HeldLift:
    """What rises at once and is held until it is let go of."""

    def __init__(self, held: list[HeldLift]) -> None:
        self.done = True
        self._held = held
        held.append(self)

    def release(self) -> None:
        if self in self._held:
            self._held.remove(self)


@pytest.fixture
def held(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[HeldLift]:
    """Every lift that has not been released."""
    held: list[HeldLift] = []
    monkeypatch.setattr(bench.store, "lift", lambda *_: HeldLift(held))
    return held


def test_what_was_typed_is_let_go_of_after_a_while_however_busy_the_server_is(bench: Bench, held: list[HeldLift]) -> None:
    bench.ask((7, *PROMPT))
    bench.scheduler.ahead.anticipate(DEFAULT_NAMESPACE, token_array(PROMPT), typing=True)
    bench.step()
    assert len(held) == 1
    bench.now += MAX_TYPING_SECONDS + 1
    bench.step()
    assert not bench.scheduler.ahead.waiting
    assert not held


def test_what_was_kept_for_a_message_is_let_go_of_when_it_comes(bench: Bench, held: list[HeldLift]) -> None:
    ahead = bench.scheduler.ahead
    ahead.anticipate(DEFAULT_NAMESPACE, token_array(PROMPT), typing=True)
    ahead.anticipate(DEFAULT_NAMESPACE, token_array((9, *PROMPT)), typing=True)
    bench.ask((*PROMPT, 7))
    bench.step()
    assert len(held) == 1, "what another one types is still expected"
    assert ahead.waiting


def test_one_tenants_drafts_leave_places_for_anothers(bench: Bench, held: list[HeldLift]) -> None:
    ahead = bench.scheduler.ahead
    for number in range(MAX_LIFTED + 4):
        ahead.anticipate(Namespace("many"), token_array((number, *range(30))), typing=True)
    assert len(held) == MAX_LIFTED
    oldest, newest = held[0], held[-1]
    for number in range(3):
        ahead.anticipate(Namespace("few"), token_array((number, *range(30))), typing=True)
    assert len(held) == MAX_LIFTED
    assert oldest not in held
    assert newest in held
    assert all(prompt.lift in held for prompt in ahead._prompts if prompt.namespace == "few")


def test_no_more_is_held_ahead_than_the_live_cache_has_room_for(bench: Bench, held: list[HeldLift]) -> None:
    for number in range(10):
        bench.scheduler.ahead.anticipate(DEFAULT_NAMESPACE, token_array((number, *PROMPT)), typing=True)
    assert len(held) == 1024 // (1 + len(PROMPT))


def test_nothing_is_computed_ahead_beyond_its_tenants_limit(bench: Bench) -> None:
    bench.scheduler.pool.evictor.shares.allow(DEFAULT_NAMESPACE, Allowance(live_cells=100))
    bench.scheduler.ahead.anticipate(DEFAULT_NAMESPACE, token_array(PROMPT))
    bench.run()
    assert 0 < bench.scheduler.pool.used_cells <= 100
    assert not bench.scheduler.ahead.waiting


def test_while_every_place_is_taken_what_slow_tiers_have_of_the_next_ones_rises(held: list[HeldLift], bench: Bench) -> None:
    for number in range(8):
        bench.ask((100 + number, *PROMPT[:60]), user=str(number), n=50)
        bench.step()
    assert not held, "whoever has started let go"
    waiting = [bench.ask((200 + number, *PROMPT), user=str(number)) for number in range(3)]
    bench.step()
    assert [task.sequence for task in waiting] == [None] * 3
    assert len(held) == 3
