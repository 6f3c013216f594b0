"""Fairness, budget and layout advice, each alone."""

from __future__ import annotations

from collections import Counter

import pytest

from pasture.core.values import Layout, PoolShape, Request, RequestId, SamplingParams
from pasture.scheduler.budget import PrefillBudget
from pasture.scheduler.fairness import FairQueue
from pasture.scheduler.layout import SETTLE_STEPS, LayoutAdvisor, Target, Traffic
from pasture.scheduler.task import Task

HOME = PoolShape(32768, 255)


def task(name: str, tenant: str = "t", user: str = "u", n_tokens: int = 100) -> Task:
    request = Request(RequestId(name), tuple(range(n_tokens)), 10, SamplingParams(), tenant=tenant, user=user)
    return Task(request, 0.0, lambda: False)


def serve(queue: FairQueue, n: int) -> list[Task]:
    """Start `n` tasks, each time the first that fairness offers."""
    started = []
    for _ in range(n):
        offered = queue.eligible(lambda _: True, lambda t: len(t.tokens))
        queue.remove(offered[0], len(offered[0].tokens))
        started.append(offered[0])
    return started


def test_a_user_with_many_requests_gets_no_more_than_one_with_few() -> None:
    queue = FairQueue()
    for i in range(50):
        queue.push(task(f"greedy{i}", user="greedy"))
    for i in range(5):
        queue.push(task(f"modest{i}", user="modest"))
    users = Counter(t.request.user for t in serve(queue, 10))
    assert users["modest"] >= 4


def test_a_tenant_with_many_users_gets_no_more_than_one_with_a_single_user() -> None:
    queue = FairQueue()
    for i in range(30):
        queue.push(task(f"a{i}", tenant="big", user=f"u{i}"))
        queue.push(task(f"b{i}", tenant="small", user="only"))
    tenants = Counter(t.request.tenant for t in serve(queue, 20))
    assert 7 <= tenants["small"] <= 13


def test_long_prompts_pay_for_their_length() -> None:
    queue = FairQueue()
    for i in range(40):
        queue.push(task(f"long{i}", user="long", n_tokens=1000))
        queue.push(task(f"short{i}", user="short", n_tokens=100))
    started = serve(queue, 22)
    tokens = Counter[str]()
    for t in started:
        tokens[t.request.user] += len(t.tokens)
    assert 0.3 < tokens["short"] / tokens["long"] < 3


def test_who_is_not_ready_does_not_hold_up_the_same_user_or_others() -> None:
    queue = FairQueue()
    tasks = [task("first"), task("second"), task("other", user="v")]
    for t in tasks:
        queue.push(t)
    offered = queue.eligible(lambda t: t is not tasks[0], lambda t: 1)
    assert offered == tasks[1:]
    assert len(queue) == 3


def test_removing_a_cancelled_task_leaves_the_others() -> None:
    queue = FairQueue()
    one, two = task("one"), task("two")
    queue.push(one)
    queue.push(two)
    queue.remove(one)
    assert one not in queue
    assert list(queue) == [two]
    with pytest.raises(KeyError):
        queue.remove(one)


def learnt(target: float, base: float, per_row: float, per_token: float) -> PrefillBudget:
    budget = PrefillBudget(target, 2048)
    for i in range(200):
        rows, tokens = i % 17, (i * 37) % 200
        budget.observe(rows, tokens, base + per_row * rows + per_token * tokens)
    return budget


def test_the_budget_learns_what_a_step_costs_and_fills_the_target() -> None:
    budget = learnt(0.2, 0.02, 0.005, 0.003)
    assert budget.tokens_per_second == pytest.approx(1 / 0.003, rel=0.05)
    assert budget.tokens(16) == pytest.approx((0.2 - 0.02 - 0.08) / 0.003, abs=4)


def test_prefill_never_stops_and_never_exceeds_the_batch() -> None:
    assert learnt(0.05, 0.02, 0.005, 0.003).tokens(16) == 32
    assert learnt(10.0, 0.02, 0.005, 0.0001).tokens(16) == 2048 - 16


def test_one_stalled_step_does_not_spoil_what_was_learnt() -> None:
    budget = learnt(0.2, 0.02, 0.005, 0.003)
    before = budget.tokens(8)
    budget.observe(8, 20, 30.0)
    assert budget.tokens(8) > before * 0.3


def traffic(rows: int, shared: int, own: int, n_ids: int = 0, longest: int = 0) -> Traffic:
    return Traffic(rows, rows * (shared + own), shared + rows * own, 0, longest or shared + own, n_ids or rows)


def settle(advisor: LayoutAdvisor, layout: Layout, t: Traffic, factor: float = 1.0) -> None:
    for _ in range(SETTLE_STEPS):
        advisor.observe(layout, t, t.rows, factor * t.rows * t.row_cost(layout))


def test_private_traffic_moves_to_streams_and_shared_traffic_stays() -> None:
    advisor = LayoutAdvisor(HOME)
    assert advisor.advise(HOME, traffic(16, 1000, 100)) is None
    assert advisor.advise(HOME, traffic(16, 0, 1100)) == Target(Layout.STREAMS, 16)


def test_streams_are_left_when_sharing_begins_and_not_before_they_have_settled() -> None:
    advisor = LayoutAdvisor(HOME)
    streams = PoolShape(32768, 16, Layout.STREAMS)
    advisor.moved()
    sharing = traffic(16, 1500, 60)
    assert advisor.advise(streams, sharing) is None
    settle(advisor, Layout.STREAMS, sharing)
    assert advisor.advise(streams, sharing) == Target(Layout.UNIFIED, 255)


def test_cramped_streams_are_left_at_once() -> None:
    advisor = LayoutAdvisor(HOME)
    streams = PoolShape(32768, 16, Layout.STREAMS)
    advisor.moved()
    assert advisor.advise(streams, traffic(2, 0, 100, longest=2048)) == Target(Layout.UNIFIED, 255)
    assert advisor.advise(streams, traffic(20, 0, 500)) == Target(Layout.STREAMS, 32)


def test_streams_too_short_for_the_conversations_are_not_advised() -> None:
    assert LayoutAdvisor(HOME).advise(HOME, traffic(16, 0, 1100, longest=1900)) is None


def test_a_move_that_cost_time_is_not_repeated() -> None:
    advisor = LayoutAdvisor(HOME)
    private = traffic(16, 0, 600)
    streams = PoolShape(32768, 16, Layout.STREAMS)
    for _ in range(4):
        settle(advisor, Layout.UNIFIED, private)
        if advisor.advise(HOME, private) is None:
            return
        advisor.moved()
        settle(advisor, Layout.STREAMS, private, factor=2.0)
        advisor.advise(streams, private)
        advisor.moved()
    pytest.fail("moved four times to a layout that takes twice the time")
