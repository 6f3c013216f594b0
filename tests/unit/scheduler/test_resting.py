"""What is copied out of the live cache in quiet moments, so that a process that is killed loses none of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from pasture.core.values import Namespace, PoolShape, Request, RequestId, Save, SeqId, StepPlan, Work
from pasture.engine.fake import FakeEngine
from pasture.kv.pool import Pool
from pasture.kv.radix import token_array
from pasture.kv.sequence import Sequence
from pasture.scheduler.loop import EngineLoop
from pasture.scheduler.resting import Resting
from pasture.scheduler.settings import SchedulerSettings
from pasture.scheduler.task import Task
from tests.store_support import store_for

NAME = Namespace("tests")


@pytest.fixture
def resting() -> Iterator[Resting]:
    engine = FakeEngine(PoolShape(1024, 1))
    with closing(store_for(engine)) as store:
        pool = Pool(engine.shape, clock=lambda: 0.0)
        yield Resting(pool, store, engine.codec, lambda: 0.0, SchedulerSettings(), lambda: None)


def rest(pool: Pool, first: int, n_tokens: int = 100, *, after: int = 0, namespace: Namespace = NAME) -> Sequence:
    """A request that leaves an idle sequence of so many tokens, of which `after` are everybody's."""
    tokens = token_array([*range(after), *range(first, first + n_tokens - after)])
    sequence = pool.join(namespace, tokens, RequestId("r"))
    assert sequence is not None
    pool.extend(sequence, tokens[sequence.length :])
    pool.finish(sequence)
    return sequence


def copies(resting: Resting, pool: Pool) -> int:
    """How often something is copied out now."""
    pool.operations()
    while resting.copy_idle():
        pass
    return sum(isinstance(operation, Save) for operation in pool.operations())


def test_what_is_idle_is_copied_once(resting: Resting) -> None:
    pool = resting._pool
    rest(pool, 1000)
    assert copies(resting, pool) == 1
    assert copies(resting, pool) == 0, "even where the store has not kept it"


def test_who_gets_the_id_of_one_that_was_copied_is_copied_too(resting: Resting) -> None:
    pool = resting._pool
    before = rest(pool, 1000)
    copies(resting, pool)
    after = rest(pool, 2000)
    assert (after.id, after.length) == (before.id, before.length)
    assert copies(resting, pool) == 1
    assert len(resting._copied) == 1


def test_one_that_was_cut_back_and_grew_to_the_same_length_is_copied_again(resting: Resting) -> None:
    pool = resting._pool
    before = rest(pool, 1000, after=50)
    copies(resting, pool)
    after = rest(pool, 2000, after=50)
    assert (after, after.length) == (before, 100)
    assert copies(resting, pool) == 1


def test_who_goes_on_with_what_is_leaving_waits_until_it_is_stored(resting: Resting) -> None:
    """Its id was given to somebody else in the step in which its owner might have started: all of it was computed again."""
    pool = resting._pool
    before = rest(pool, 1000)
    said = before.tokens()
    again = Task(Request(RequestId("again"), (*said, 5), 1, namespace=NAME), 0.0, lambda: False)
    other = Task(Request(RequestId("other"), tuple(range(2000, 2100)), 1, namespace=NAME), 0.0, lambda: False)
    assert resting.look(again), "it is live"
    pool.operations()
    pool.drop(before, "idle")
    assert not resting.look(again)
    assert not resting.look(again), "until the step is done"
    assert resting.look(other), "nothing of this one is on its way"
    saves = [operation for operation in pool.operations() if isinstance(operation, Save)]
    engine = FakeEngine(pool.shape)
    engine.execute(StepPlan((), (Work(SeqId(0), said, 0, None),)))
    resting.saved(engine.execute(StepPlan(tuple(saves), ())).saved)
    assert resting.look(again)
    assert again.stored_tokens == len(said), "and is worth what is stored of it"


def test_of_several_saves_the_one_with_most_of_the_prompt_is_waited_for() -> None:
    """Everybody has the system prompt in common, and the last to leave may have nothing else."""
    engine = FakeEngine(PoolShape(1024, 4))
    pool = Pool(engine.shape, clock=lambda: 0.0)
    with closing(store_for(engine)) as store:
        resting = Resting(pool, store, engine.codec, lambda: 0.0, SchedulerSettings(), lambda: None)
        mine, other, _ = (rest(pool, first, after=50) for first in (1000, 2000, 3000))  # the third keeps what all have
        again = Task(Request(RequestId("again"), (*mine.tokens(), 5), 1, namespace=NAME), 0.0, lambda: False)
        assert resting.look(again)
        for sequence in (mine, other):
            pool.drop(sequence, "idle")
        assert not resting.look(again)


def test_a_request_waits_for_one_save_at_most(resting: Resting) -> None:
    """Cells are taken piece by piece, by a store that keeps none of them: it had better start with what is left."""
    pool = resting._pool
    again = Task(Request(RequestId("again"), tuple(range(1000, 1101)), 1, namespace=NAME), 0.0, lambda: False)
    for turn in range(3):
        pool.drop(rest(pool, 1000), "idle")
        assert resting.look(again) is (turn > 0)
        pool.operations()
        resting._saving.clear()


def test_what_nobody_used_for_too_long_is_forgotten_and_not_saved() -> None:
    engine, now = FakeEngine(PoolShape(1024, 8)), [0.0]
    pool = Pool(engine.shape, clock=lambda: now[0])
    with closing(store_for(engine)) as store:
        settings = SchedulerSettings(idle_live_seconds=5.0, expire_seconds=100.0)
        resting = Resting(pool, store, engine.codec, lambda: now[0], settings, lambda: None)
        assert resting.expires_in() is None
        rest(pool, 1000, after=50)
        now[0] = 60.0
        rest(pool, 2000, after=50)
        assert resting.expires_in() == 40.0
        now[0] = 100.0
        resting.expire()
        assert pool.used_cells == 100, "what somebody else shares stays with them"
        assert resting.expires_in() == 60.0
        now[0] = 1000.0
        resting.expire()
        assert not pool.used_cells
        assert pool.evicted_cells["expired"] == 150
        assert not any(isinstance(operation, Save) for operation in pool.operations())


def test_a_namespace_may_have_a_time_of_its_own() -> None:
    engine, now = FakeEngine(PoolShape(1024, 8)), [0.0]
    pool = Pool(engine.shape, clock=lambda: now[0])
    with closing(store_for(engine)) as store:
        resting = Resting(pool, store, engine.codec, lambda: now[0], SchedulerSettings(expire_seconds=100.0), lambda: None)
        rest(pool, 1000, after=50)
        now[0] = 10.0
        rest(pool, 2000, after=50, namespace=Namespace("hasty"))
        assert resting.expires_in() == 90.0
        resting.keep_for({Namespace("hasty"): 20.0})
        assert resting.expires_in() == 20.0
        now[0] = 30.0
        resting.expire()
        assert [sequence.namespace for sequence in pool.sequences.values()] == [NAME]
        assert resting.expires_in() == 70.0


def test_each_leaves_the_live_cache_when_it_has_rested_long_enough_and_not_before() -> None:
    engine, now = FakeEngine(PoolShape(1024, 8)), [0.0]
    pool = Pool(engine.shape, clock=lambda: now[0])
    with closing(store_for(engine)) as store:
        resting = Resting(pool, store, engine.codec, lambda: now[0], SchedulerSettings(idle_live_seconds=5.0), lambda: None)
        left = {}
        for now[0] in (0.5 * tick for tick in range(40)):
            if now[0] in (1.0, 3.0, 12.5):
                rest(pool, 1000 * int(now[0]))
            while resting.demote():
                left[now[0]] = len(pool.sequences)
    assert left == {6.0: 1, 8.0: 0, 17.5: 0}


def test_nothing_is_looked_up_for_a_save_that_cannot_pay(resting: Resting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside an engine that computes faster than it moves KV, this is what every conversation that leaves would cost."""
    asked: list[int] = []

    def refuse(n_tokens: int) -> bool:
        asked.append(n_tokens)
        return False

    monkeypatch.setattr(resting.store, "worth_saving", refuse)
    monkeypatch.setattr(resting.store, "gap", lambda *_: pytest.fail("looked up"))
    rest(resting._pool, 1000)
    assert copies(resting, resting._pool) == 0
    assert asked == [100]


def test_all_that_is_due_leaves_the_live_cache_before_the_engine_rests() -> None:
    engine = FakeEngine(PoolShape(1024, 8))
    loop = EngineLoop(engine, SchedulerSettings(idle_live_seconds=0.0), store_for(engine), lambda _: None)
    for name, first in (("a", 0), ("b", 1000), ("c", 2000)):
        loop._scheduler.submit(Task(Request(RequestId(name), tuple(range(first, first + 20)), 0), 0.0, lambda: False))
    n_steps = 0
    while loop.step():
        n_steps += 1
        assert n_steps < 50
    assert not loop._scheduler.pool.used_cells
    loop._store.close()


def test_an_engine_waits_for_no_time_that_cannot_be_waited_for() -> None:
    engine = FakeEngine(PoolShape(1024, 8))
    loop = EngineLoop(engine, SchedulerSettings(expire_seconds=1e12), store_for(engine), lambda _: None)
    loop.start()
    try:
        for name in ("a", "b"):
            loop.submit(Task(Request(RequestId(name), tuple(range(300)), 0), 0.0, lambda: False))
            deadline = time.monotonic() + 1.0
            while time.monotonic() < deadline:
                assert loop.alive
                time.sleep(0.05)
    finally:
        loop.stop()


def test_a_server_that_nobody_asks_anything_forgets_too() -> None:
    engine = FakeEngine(PoolShape(1024, 8))
    store = store_for(engine)
    finished = threading.Event()
    loop = EngineLoop(engine, SchedulerSettings(expire_seconds=0.6), store, lambda _: finished.set())
    loop.start()
    try:
        loop.submit(Task(Request(RequestId("r"), tuple(range(300)), 0), 0.0, lambda: False))
        assert finished.wait(10.0)
        assert loop.snapshot[0].used_cells == 300
        deadline = time.monotonic() + 10.0
        while loop.snapshot[0].used_cells and time.monotonic() < deadline:
            time.sleep(0.05)
        assert loop.snapshot[0].used_cells == 0
    finally:
        loop.stop()
