"""Thousands of random steps on the fake engine: the books stay true, and every request gets the text that a lone run gives.

The store behind the pool has no room, little, or plenty.

Rules: requests arrive (new, alike, following up on finished ones, several choices of one prompt), readers fall behind, clients
vanish, the engine fails, the pool is compacted or moved to the other layout, steps run. Requests have priorities, and a tenant
may have a limit of cells. The pools are small, so eviction and swapping happen all the time. After every step the
conservation law is checked, and the engine's cells are compared with the tree.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from pasture.core.values import (
    Allowance,
    FinishReason,
    Form,
    Layout,
    Namespace,
    Outcome,
    PoolShape,
    Request,
    RequestId,
    SamplingParams,
    StepPlan,
)
from pasture.engine.fake import FakeEngine, expected_reply
from pasture.kv import placement
from pasture.kv.radix import token_array
from pasture.scheduler.scheduler import Delivery, Scheduler
from pasture.scheduler.settings import SchedulerSettings
from pasture.scheduler.task import Task
from tests.store_support import still_store_for

TOKENS = st.integers(0, 255)
STEMS = [[(7 * stem + i) % 250 for i in range(length)] for stem, length in enumerate((5, 24, 47, 60))]


class SchedulerMachine(RuleBasedStateMachine):
    layout = Layout.UNIFIED
    share = True
    recurrent = False

    @initialize(
        n_cells=st.sampled_from([192, 320, 1024]),
        n_seqs=st.sampled_from([1, 2, 3, 8]),
        n_batch=st.sampled_from([4, 24, 256]),
        ram_bytes=st.sampled_from([0, 20_000, 1 << 30]),
        max_running=st.sampled_from([2, 255]),
        limit=st.sampled_from([None, 150]),
    )
    def start(self, n_cells: int, n_seqs: int, n_batch: int, ram_bytes: int, max_running: int, limit: int | None) -> None:
        self.now = 0.0
        self.patch = patch.object(placement, "MIN_BREAKS", 2)
        self.patch.start()
        self.n_cells = n_cells
        shape = PoolShape(n_cells, n_seqs, self.layout, n_batch, tile_tokens=8, can_pad=not self.recurrent)
        self.engine = FakeEngine(shape, recurrent=self.recurrent)
        self.store = still_store_for(self.engine, ram_bytes)
        scheduling = SchedulerSettings(
            share_prefix=self.share, check_invariants=True, idle_live_seconds=2.0, max_running=max_running
        )
        self.max_running = max_running
        self.allowances = {"a": Allowance(), "b": Allowance(weight=2.0), "c": Allowance(live_cells=limit)}
        self.scheduler = Scheduler(self.engine, scheduling, self.store, lambda: self.now)
        self.n_requests = 0
        self.live: dict[RequestId, Task] = {}
        self.replies: dict[RequestId, list[int]] = {}
        self.finished: list[list[int]] = []
        self.unread: set[RequestId] = set()
        self.engine_failed = False

    # Requests

    @rule(
        stem=st.sampled_from(STEMS),
        tail=st.lists(TOKENS, max_size=12),
        n_choices=st.integers(1, 4),
        max_tokens=st.one_of(st.integers(0, 24), st.integers(90, 120)),
        user=st.sampled_from("abc"),
        stops=st.frozensets(st.integers(0, 511), max_size=12),
        sampled=st.booleans(),
        priority=st.sampled_from([-1, 0, 0, 1]),
    )
    def arrive(
        self,
        stem: list[int],
        tail: list[int],
        n_choices: int,
        max_tokens: int,
        user: str,
        stops: frozenset[int],
        sampled: bool,
        priority: int,
    ) -> None:
        for _ in range(n_choices):
            self._submit(stem + tail, max_tokens, user, stops, sampled, priority)

    @precondition(lambda self: bool(self.finished))
    @rule(data=st.data(), tail=st.lists(TOKENS, min_size=1, max_size=6), max_tokens=st.integers(1, 16))
    def follow_up(self, data: Any, tail: list[int], max_tokens: int) -> None:
        self._submit(data.draw(st.sampled_from(self.finished)) + tail, max_tokens, "a", frozenset(), False)

    def _submit(
        self, prompt: list[int], max_tokens: int, user: str, stops: frozenset[int], sampled: bool, priority: int = 0
    ) -> None:
        limit = min(self.scheduler.pool.shape.cells_per_sequence, self.allowances[user].live_cells or self.n_cells)
        prompt = prompt[: limit - 2] or [1]
        self.n_requests += 1
        request_id = RequestId(f"r{self.n_requests}")
        request = Request(
            request_id,
            tuple(prompt),
            min(max_tokens, limit - len(prompt) - 1),
            SamplingParams(temperature=1.0 if sampled else 0.0, seed=self.n_requests),
            namespace=Namespace(user if user == "c" else "shared"),
            tenant=user,
            user=user,
            stop_tokens=stops,
            allowance=self.allowances[user],
            priority=priority,
        )
        task = Task(request, self.now, lambda: request_id in self.unread)
        self.live[request_id], self.replies[request_id] = task, []
        self.scheduler.submit(task)

    @precondition(lambda self: bool(self.live))
    @rule(data=st.data())
    def vanish(self, data: Any) -> None:
        self.scheduler.cancel(data.draw(st.sampled_from(sorted(self.live))))

    @precondition(lambda self: bool(self.live))
    @rule(data=st.data())
    def stop_reading(self, data: Any) -> None:
        self.unread.add(data.draw(st.sampled_from(sorted(self.live))))

    @rule()
    def read_again(self) -> None:
        self.unread.clear()

    # The engine

    @rule(outcomes=st.lists(st.sampled_from([Outcome.FAILED, Outcome.NO_ROOM, Outcome.INTERRUPTED]), min_size=1, max_size=2))
    def fail(self, outcomes: list[Outcome]) -> None:
        self.engine.fail_next(*outcomes)
        self.engine_failed = True

    @rule()
    def evict(self) -> None:
        self.scheduler.pool.evict_idle("cells")

    @precondition(lambda self: self.share and not self.recurrent)
    @rule(layout=st.sampled_from(Layout))
    def lay_out_anew(self, layout: Layout) -> None:
        pool = self.scheduler.pool
        longest = pool.shape.n_cells if layout is Layout.UNIFIED else pool.shape.n_cells // pool.shape.n_seqs
        too_long = any(len(t.request.prompt) + t.request.max_tokens >= longest for t in self.live.values())
        if too_long or not pool.make_movable(layout, pool.shape.n_seqs, longest):
            return
        plan = StepPlan(pool.operations(), ())
        self._deliver(self.scheduler.commit(plan, self.engine.execute(plan)))
        pool.rebuilt(self.engine.rebuild(pool.segments(), layout, pool.shape.n_seqs))

    @rule(stem=st.sampled_from(STEMS), tail=st.lists(TOKENS, max_size=12), typing=st.booleans())
    def anticipate(self, stem: list[int], tail: list[int], typing: bool) -> None:
        self.scheduler.ahead.anticipate(Namespace("shared"), token_array(stem + tail), typing=typing)

    @rule()
    def demote(self) -> None:
        self.scheduler.resting.demote()

    @rule()
    def copy_idle(self) -> None:
        self.scheduler.resting.copy_idle()

    @precondition(lambda self: self.share and not self.recurrent and self.layout is Layout.UNIFIED)
    @rule(form=st.sampled_from([Form.RAW, Form.Q8_0]))
    def rewrite(self, form: Form) -> None:
        pool, raw = self.scheduler.pool, self.n_cells
        if pool.shape.layout is Layout.STREAMS or (form is Form.RAW and not pool.make_room(pool.shape.n_cells - raw)):
            return
        longest = max((len(t.request.prompt) + t.request.max_tokens for t in self.live.values()), default=0)
        if form is Form.RAW and longest >= raw:
            return
        plan = StepPlan(pool.operations(), ())
        self._deliver(self.scheduler.commit(plan, self.engine.execute(plan)))
        pool.rebuilt(self.engine.rebuild(pool.segments(), pool.shape.layout, pool.shape.n_seqs, form))

    @rule(n=st.integers(1, 12))
    def step(self, n: int) -> None:
        for _ in range(n):
            plan = self.scheduler.schedule()
            self._deliver(self.scheduler.commit(plan, self.engine.execute(plan)))
            self.now += 0.25

    def _deliver(self, events: list[Delivery]) -> None:
        for task, event in events:
            request = task.request
            reply = self.replies[request.request_id]
            if event.token is not None:
                reply.append(event.token)
            if event.finish is None:
                continue
            del self.live[request.request_id]
            self.unread.discard(request.request_id)
            expected = expected_reply(request.prompt, request.max_tokens, request.sampling, request.stop_tokens)
            assert reply == expected[: len(reply)]
            if event.finish.reason in (FinishReason.STOP, FinishReason.LENGTH):
                assert reply == expected
                assert event.finish.usage.completion_tokens == len(reply)
            elif event.finish.reason is FinishReason.ERROR:
                assert self.engine_failed
            self.finished.append(list(request.prompt) + reply)

    @invariant()
    def books_are_true(self) -> None:
        pool = self.scheduler.pool
        pool.check()
        assert len(self.scheduler.running) <= self.max_running
        assert all(task.sequence is None for task in self.scheduler.swapped.values())
        if not pool.has_operations:
            assert (self.engine.used_cells, self.engine.left_cells) == (pool.used_cells, pool.placement.left_cells)
            for sequence in pool.sequences.values():
                assert self.engine.tokens_of(sequence.id) == list(sequence.tokens())

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.patch.stop()
        self.unread.clear()
        for _ in range(20_000):
            if not self.scheduler.busy:
                break
            self.step(1)
        self._deliver(self.scheduler.take_events())
        self.store.close()
        self.scheduler.ahead.give_way()
        assert not self.live
        assert self.scheduler.pool.locked_cells == 0
        assert not self.scheduler.running
        assert not self.scheduler.swapped
        assert not len(self.scheduler.waiting)


@pytest.mark.parametrize(
    ("layout", "share", "recurrent"),
    [
        (Layout.UNIFIED, True, False),
        (Layout.STREAMS, True, False),
        (Layout.UNIFIED, False, False),
        (Layout.UNIFIED, True, True),
    ],
    ids=["unified", "streams", "sharing off", "recurrent"],
)
@pytest.mark.timeout(300)
def test_books_and_texts(layout: Layout, share: bool, recurrent: bool) -> None:
    machine = type("Machine", (SchedulerMachine,), {"layout": layout, "share": share, "recurrent": recurrent})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
        ),
    )
