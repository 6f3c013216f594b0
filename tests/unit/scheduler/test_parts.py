"""Fairness, budget and layout advice, each alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from pasture.core.values import Allowance, Layout, PoolShape, Request, RequestId, SamplingParams
from pasture.scheduler.costs import Load, StepCosts
from pasture.scheduler.fairness import FairQueue
from pasture.scheduler.layout import SETTLE_STEPS, LayoutAdvisor, Target, Traffic
from pasture.scheduler.task import Task

HOME = PoolShape(32768, 255)


def task(name: str, tenant: str = "t", user: str = "u", n_tokens: int = 100, weight: float = 1.0, priority: int = 0) -> Task:
    request = Request(
        RequestId(name),
        tuple(range(n_tokens)),
        10,
        SamplingParams(),
        tenant=tenant,
        user=user,
        allowance=Allowance(weight),
        priority=priority,
    )
    return Task(request, 0.0, lambda: False)


def most_urgent(tasks: list[Task]) -> list[Task]:
    return [t for t in tasks if t.request.priority == max(other.request.priority for other in tasks)]


def serve(queue: FairQueue, n: int) -> list[Task]:
    """Start `n` tasks, each time the first that fairness offers."""
    started = []
    for _ in range(n):
        offered = queue.eligible(lambda _: True, lambda t: len(t.tokens), lambda t: t.request.priority, most_urgent)
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


def test_a_tenant_of_three_times_the_weight_gets_three_times_the_turns() -> None:
    queue = FairQueue()
    for i in range(60):
        queue.push(task(f"a{i}", tenant="large", weight=3.0, n_tokens=300))
        queue.push(task(f"b{i}", tenant="small", n_tokens=300))
    tenants = Counter(t.request.tenant for t in serve(queue, 40))
    assert 26 <= tenants["large"] <= 34


def test_the_more_urgent_go_first_whoever_they_are_from() -> None:
    queue = FairQueue()
    for i in range(4):
        queue.push(task(f"later{i}", tenant="one", user="v", priority=-1))
        queue.push(task(f"other{i}", tenant="two"))
        queue.push(task(f"usual{i}", tenant="one"))
        queue.push(task(f"urgent{i}", tenant="one", priority=1))
    assert queue.highest_priority == 1
    names = [t.request.request_id for t in serve(queue, 16)]
    assert all(name.startswith("urgent") for name in names[:4])
    assert {name[:5] for name in names[4:12]} == {"other", "usual"}
    assert all(name.startswith("later") for name in names[12:])
    assert queue.highest_priority == 0


def test_a_tenant_with_more_users_than_are_looked_at_does_not_hide_another() -> None:
    queue = FairQueue()
    for i in range(200):
        queue.push(task(f"a{i}", tenant="big", user=f"u{i}"))
    queue.push(task("b", tenant="small"))
    assert "b" in [t.request.request_id for t in serve(queue, 3)]


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
    offered = queue.eligible(lambda t: t is not tasks[0], lambda t: 1, lambda t: 0, lambda tasks: tasks)
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


UNIFIED = PoolShape(32768, 64, tile_tokens=64, can_pad=True)


def seconds(load: Load, n_rows: int) -> float:
    """A machine with a cliff at 64 rows."""
    if n_rows < 64:
        return 0.01 + 0.004 * n_rows + 13e-6 * load.attended_cells
    return 0.01 + 0.004 * n_rows + 20e-6 * (load.distinct_cells + (-(-n_rows // 64) - 1) * load.prompt_cells)


def learnt(target: float = 0.2) -> StepCosts:
    costs = StepCosts(target)
    for i in range(300):
        cells = 1000 + (i * 131) % 4000
        load = Load(i % 17, (i * 37) % 200, 1000 * ((i * 7) % 30 + 1), cells, cells // 2)
        if load.n_tokens:
            costs.observe(UNIFIED, load, 0, seconds(load, load.n_tokens))
    return costs


def test_a_stream_that_was_alone_for_long_does_not_change_what_more_rows_are_thought_to_cost() -> None:
    costs, noise = learnt(), Random(1)
    few = Load(0, 14, 14 * 300, 314, 314)
    before = costs.expected_seconds(UNIFIED, few)
    for written in range(3000):
        alone = Load(1, 0, 100 + written % 700, 100 + written % 700, 0)
        costs.observe(UNIFIED, alone, 0, seconds(alone, 1) * noise.uniform(0.8, 1.3))
    assert costs.expected_seconds(UNIFIED, few) == pytest.approx(before, rel=0.4)
    assert costs.padding(UNIFIED, few) == 0


def test_costs_are_learnt_on_both_sides_of_the_cliff() -> None:
    costs = learnt()
    for load in (Load(16, 0, 16_000, 2000, 0), Load(16, 100, 116_000, 2000, 1000), Load(0, 640, 300_000, 4000, 4000)):
        assert costs.expected_seconds(UNIFIED, load) == pytest.approx(seconds(load, load.n_tokens), rel=0.15)


def prompt(own: int, joined: int) -> Load:
    return Load(0, 1, own, joined, own)


def test_prompts_bring_a_step_up_to_a_tile_and_no_further_than_the_target() -> None:
    costs, streams = learnt(), Load(16, 0, 16_000, 2000, 0)
    assert costs.step(UNIFIED, streams, prompt(1000, 2000)) == 48
    assert learnt(2.0).step(UNIFIED, streams, prompt(1000, 2000)) > 200
    small = PoolShape(1000, 4, n_batch=20, tile_tokens=64)
    assert costs.step(small, streams, prompt(1000, 2000)) == 4


def test_a_step_may_take_longer_where_more_wait_than_stream() -> None:
    costs, streams = learnt(), Load(4, 0, 4_000, 2000, 0)
    taken = [costs.step(UNIFIED, streams, prompt(1000, 2000), n_waiting) for n_waiting in (0, 4, 12, 500)]
    assert taken == [60, 60, 124, 124]
    quiet = [costs.step(UNIFIED, Load(0, 0, 0, 0, 0), prompt(1000, 1000), n_waiting) for n_waiting in (1, 3)]
    assert quiet[0] < quiet[1]


def test_a_step_that_nobody_should_wait_for_is_a_tile_however_long_the_streams_take() -> None:
    costs, nobody, crowd = learnt(0.8), Load(0, 0, 0, 0, 0), Load(60, 0, 600_000, 12_000, 0)
    for streams in (nobody, crowd):
        long, brief = (costs.step(UNIFIED, streams, prompt(1000, 13_000), brief=brief) for brief in (False, True))
        assert brief < long
    assert learnt(0.2).step(UNIFIED, nobody, prompt(1000, 1000), brief=True) == 64


def test_streams_over_other_cells_than_the_prompt_get_a_batch_of_their_own() -> None:
    costs = learnt()
    few = Load(2, 0, 2 * 500, 1000, 0)
    assert costs.step(UNIFIED, few, prompt(200, 12_000)) == 64
    assert costs.step(UNIFIED, few, prompt(200, 300)) == 62, "beside them it fills their tile"


def test_a_step_is_filled_up_where_that_is_cheaper() -> None:
    costs = learnt()
    assert costs.padding(UNIFIED, Load(40, 0, 60_000, 2000, 0)) == 64
    assert costs.padding(UNIFIED, Load(2, 0, 200, 2000, 0)) == 0
    assert costs.padding(PoolShape(1000, 4, tile_tokens=64), Load(40, 0, 60_000, 2000, 0)) == 0


def test_a_short_chunk_of_a_stream_is_filled_up_where_that_is_cheaper() -> None:
    shape = PoolShape(32768, 16, Layout.STREAMS, tile_tokens=64, can_pad=True)
    costs = StepCosts(0.2)
    for i in range(200):
        load = Load(i % 17, 65 * (i % 3), 1000 * (i % 17), 5000, 0)
        costs.observe(shape, load, 0, 0.01 + 0.004 * load.n_tokens + 13e-6 * load.attended_cells)
    assert costs.chunk_padding(shape, 40, 1000) == 25
    assert costs.chunk_padding(shape, 4, 1000) == 0
    assert costs.chunk_padding(shape, 65, 1000) == 0
    assert costs.chunk_padding(shape, 40, 2000) == 0  # 65 more would not fit behind


def test_one_stalled_step_does_not_spoil_what_was_learnt() -> None:
    costs = learnt()
    load = Load(16, 0, 16_000, 2000, 0)
    before = costs.expected_seconds(UNIFIED, load)
    costs.observe(UNIFIED, load, 0, 30.0)
    assert costs.expected_seconds(UNIFIED, load) < before * 2.5


def test_without_a_cliff_the_target_alone_decides() -> None:
    shape = PoolShape(32768, 64)
    costs = StepCosts(0.2)
    for i in range(200):
        load = Load(i % 17, (i * 37) % 400, 0, 2000, 2000)
        costs.observe(shape, load, 0, 0.02 + 0.001 * load.n_tokens)
    assert costs.step(shape, Load(16, 0, 0, 2000, 0), prompt(2000, 2000)) == pytest.approx(164, abs=40)


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


def test_the_last_of_a_wave_are_not_moved_for_the_idle_cells_of_the_others() -> None:
    left = Traffic(3, 3 * 1200, 1000 + 3 * 200, 20_000, 1200, 16)
    assert LayoutAdvisor(HOME).advise(HOME, left) is None
    assert LayoutAdvisor(HOME).advise(HOME, replace(left, rows=4, attended_cells=4 * 1200)) is not None


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


def test_the_prefill_rate_is_what_prompts_really_took() -> None:
    costs = StepCosts(0.2)
    for i in range(50):
        costs.observe(PoolShape(32768, 64), Load(0, 500 + i, 0, 1000, 1000), 0, (500 + i) / 200_000)
    assert costs.tokens_per_second == pytest.approx(200_000, rel=0.01)
    costs.observe(PoolShape(32768, 64), Load(16, 0, 16_000, 1000, 0), 0, 5.0)  # streams alone say nothing about prompts
    assert costs.tokens_per_second == pytest.approx(200_000, rel=0.01)
