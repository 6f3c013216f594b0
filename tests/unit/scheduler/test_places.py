"""Who makes way for whom: priorities, tenants that run too much, limits of live cells; every text stays right."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import pytest

from pasture.core.errors import PromptTooLong
from pasture.core.values import (
    Allowance,
    FinishReason,
    Layout,
    Namespace,
    PoolShape,
    Request,
    RequestId,
    SamplingParams,
    StepPlan,
)
from pasture.engine.fake import FakeEngine, expected_reply
from pasture.scheduler.keeper import LayoutKeeper
from pasture.scheduler.layout import Target
from pasture.scheduler.scheduler import Scheduler
from pasture.scheduler.service import LocalService
from pasture.scheduler.settings import SchedulerSettings
from pasture.scheduler.task import Task
from tests.store_support import still_store_for

GREEDY = SamplingParams(temperature=0)


class Server:
    """A scheduler over the fake engine, driven step by step; every finished text is compared with a lone run's."""

    def __init__(self, n_cells: int = 4096, n_seqs: int = 16, max_running: int = 255, ram_bytes: int = 1 << 30) -> None:
        self.engine = FakeEngine(PoolShape(n_cells, n_seqs))
        settings = SchedulerSettings(check_invariants=True, max_running=max_running)
        self.now = 0.0
        self.scheduler = Scheduler(self.engine, settings, still_store_for(self.engine, ram_bytes), lambda: self.now)
        self.replies: dict[str, list[int]] = defaultdict(list)
        self.finished: list[str] = []
        self.unread: set[str] = set()
        """whose readers are behind"""
        self.first_token_at: dict[str, float] = {}

    def submit(
        self,
        name: str,
        prompt: Sequence[int],
        max_tokens: int = 8,
        *,
        tenant: str = "t",
        user: str | None = None,
        priority: int = 0,
        allowance: Allowance | None = None,
    ) -> Task:
        request = Request(
            RequestId(name),
            tuple(prompt),
            max_tokens,
            GREEDY,
            namespace=Namespace(tenant),
            tenant=tenant,
            user=user or name,
            allowance=allowance or Allowance(),
            priority=priority,
        )
        task = Task(request, self.now, lambda: name in self.unread)
        self.scheduler.submit(task)
        return task

    def step(self, n: int = 1) -> None:
        for _ in range(n):
            plan = self.scheduler.schedule()
            self.now += 1.0
            for task, event in self.scheduler.commit(plan, self.engine.execute(plan)):
                request = task.request
                if event.token is not None:
                    self.first_token_at.setdefault(request.request_id, self.now)
                    self.replies[request.request_id].append(event.token)
                if event.finish is not None:
                    assert event.finish.reason is FinishReason.LENGTH
                    assert self.replies[request.request_id] == expected_reply(request.prompt, request.max_tokens, GREEDY)
                    self.finished.append(request.request_id)

    def run(self) -> None:
        while self.scheduler.busy:
            self.step()
            assert self.now < 5000


def prompt_of(n: int, n_tokens: int) -> list[int]:
    """Prompts of different `n` have nothing in common."""
    return [n, *((7 * n + i) % 250 for i in range(n_tokens - 1))]


def test_a_high_priority_takes_the_slot_of_the_lowest_which_comes_back_and_goes_on() -> None:
    server = Server(max_running=2)
    server.submit("low", prompt_of(1, 40), 30, priority=-1)
    server.submit("normal", prompt_of(2, 40), 30)
    server.step(4)
    low = server.scheduler.running[RequestId("low")]
    server.submit("urgent", prompt_of(3, 40), 4, priority=1)
    server.step(2)
    assert set(server.scheduler.running) == {"normal", "urgent"}
    assert set(server.scheduler.swapped) == {"low"}
    computed_before = server.engine.n_computed
    server.run()
    assert server.finished[0] == "urgent"
    assert low.n_swaps == 1
    assert server.engine.n_computed - computed_before <= 30 + 30 + 4 + 40, "the swapped one was not computed again"


def test_nobody_of_the_same_priority_and_tenant_is_pushed_out() -> None:
    server = Server(max_running=1)
    first = server.submit("first", prompt_of(1, 40), 20)
    server.step(2)
    server.submit("second", prompt_of(2, 10), 2)
    server.run()
    assert first.n_swaps == 0
    assert server.finished == ["first", "second"]


def test_a_high_priority_finds_room_for_its_prompt() -> None:
    server = Server(n_cells=300)
    server.submit("low", prompt_of(1, 200), 60, priority=-1)
    server.step(3)
    server.submit("urgent", prompt_of(2, 150), 4, priority=1)
    server.run()
    assert server.finished == ["urgent", "low"]


def test_while_somebody_urgent_waits_nobody_else_takes_the_place_made() -> None:
    server = Server(n_cells=400, n_seqs=2, max_running=1)
    server.submit("low", prompt_of(1, 200), 60, priority=-1)
    server.step(3)
    for n in range(3):
        server.submit(f"urgent {n}", prompt_of(2 + n, 100), 4, priority=1)
    server.run()
    assert server.finished[-1] == "low"


def test_a_tenant_that_runs_much_more_makes_way_for_one_that_runs_nothing() -> None:
    server = Server(max_running=4)
    for n in range(8):
        server.submit(f"greedy {n}", prompt_of(n, 40), 200, tenant="greedy")
    server.step(5)
    assert len(server.scheduler.running) == 4
    server.submit("modest", prompt_of(100, 40), 4, tenant="modest")
    server.step(3)
    assert "modest" in server.first_token_at
    server.run()
    assert len(server.finished) == 9


def test_tenants_that_run_about_alike_take_nothing_from_each_other() -> None:
    server = Server(max_running=4)
    tasks = [
        server.submit(f"{tenant}{n}", prompt_of(n + 10 * t, 30), 30, tenant=tenant)
        for t, tenant in enumerate("ab")
        for n in range(6)
    ]
    server.run()
    assert sum(task.n_swaps for task in tasks) == 1, "a had all four places, and gave one of them to b"


@pytest.mark.parametrize("tenants", [("limited",), ("limited", "other")])
def test_a_tenant_stays_within_its_live_cells_and_everything_is_answered(tenants: tuple[str, ...]) -> None:
    server = Server(n_cells=2000)
    allowances = {"limited": Allowance(live_cells=200), "other": Allowance()}
    for n in range(8):
        for t, tenant in enumerate(tenants):
            server.submit(f"{tenant} {n}", prompt_of(n + 20 * t, 60 + 10 * n), 50, tenant=tenant, allowance=allowances[tenant])
    most = 0
    while server.scheduler.busy:
        server.step()
        held = server.scheduler.pool.holdings.held_by
        most = max(most, held.get(Namespace("limited"), 0))
        assert server.now < 5000
    assert 150 < most <= 200
    assert len(server.finished) == 8 * len(tenants)


def test_at_its_limit_a_tenant_gives_up_its_own_idle_cells_and_nobody_elses() -> None:
    server = Server(n_cells=1000)
    server.submit("other", prompt_of(50, 300), 2, tenant="other")
    server.run()
    limited = Allowance(live_cells=250)
    for n in range(5):
        server.submit(f"limited {n}", prompt_of(n, 200), 4, tenant="limited", allowance=limited)
        server.run()
    pool = server.scheduler.pool
    assert pool.holdings.held_by[Namespace("limited")] <= 250
    assert pool.holdings.held_by[Namespace("other")] == 301
    assert pool.used_cells < pool.shape.n_cells


async def test_what_can_never_fit_into_a_tenants_cells_is_refused_and_says_why() -> None:
    engine = FakeEngine(PoolShape(1000, 4))
    service = LocalService(engine, still_store_for(engine, 1 << 20))
    request = Request(RequestId("r"), tuple(range(80)), 30, tenant="small", allowance=Allowance(live_cells=100))
    with pytest.raises(PromptTooLong, match="small may have 100 in the cache"):
        await anext(service.generate(request))
    service.close()


@pytest.mark.parametrize("flood", [20, 60])
def test_a_flood_leaves_anothers_hot_prefix_in_the_live_cache(flood: int) -> None:
    server = Server(n_cells=1000, n_seqs=64, ram_bytes=0)
    hot = prompt_of(200, 240)
    server.submit("hot", hot, 2, tenant="quiet")
    server.run()
    for n in range(flood):
        server.submit(f"flood {n}", prompt_of(n, 120), 8, tenant="greedy")
    server.run()
    again = server.submit("again", hot, 2, tenant="quiet")
    server.run()
    assert again.cached_tokens == 239


def test_without_a_guarantee_the_same_flood_pushes_it_out() -> None:
    server = Server(n_cells=1000, n_seqs=64, ram_bytes=0)
    hot = prompt_of(200, 300)
    none = Allowance(guaranteed_share=0.0)
    server.submit("hot", hot, 2, tenant="quiet", allowance=none)
    server.run()
    for n in range(20):
        server.submit(f"flood {n}", prompt_of(n, 120), 8, tenant="greedy", allowance=none)
    server.run()
    again = server.submit("again", hot, 2, tenant="quiet", allowance=none)
    server.run()
    assert again.cached_tokens < 299


def test_what_is_guaranteed_by_name_is_kept_beside_larger_weights() -> None:
    server = Server(n_cells=1000, n_seqs=64, ram_bytes=0)
    hot = prompt_of(200, 300)
    server.submit("hot", hot, 2, tenant="quiet", allowance=Allowance(guaranteed_share=0.35))
    server.run()
    for n in range(40):
        server.submit(f"flood {n}", prompt_of(n, 120), 8, tenant="greedy", allowance=Allowance(weight=50.0))
    server.run()
    again = server.submit("again", hot, 2, tenant="quiet", allowance=Allowance(guaranteed_share=0.35))
    server.run()
    assert again.cached_tokens == 299


def crowded(server: Server) -> Task:
    """One request that nobody reads holds most of the cells, another one is swapped out."""
    server.submit("unread", prompt_of(1, 200), 200)
    other = server.submit("other", prompt_of(2, 150), 60)
    while not other.swapped:
        server.step()
    server.unread.add("unread")
    return other


def test_who_is_swapped_out_comes_back_into_the_place_of_one_whose_reader_is_behind() -> None:
    server = Server(n_cells=448)
    crowded(server)
    while "other" not in server.finished:
        server.step()
        assert server.now < 500
    server.unread.clear()
    server.run()
    assert server.finished == ["other", "unread"]


def test_who_is_swapped_out_because_its_reader_is_behind_holds_up_nobody() -> None:
    server = Server(n_cells=448)
    crowded(server)
    for n in range(3):
        server.submit(f"newcomer {n}", prompt_of(3 + n, 150), 4)
    while len(server.finished) < 4:
        server.step()
        assert server.now < 500
    server.unread.clear()
    server.run()
    assert server.finished[-1] == "unread"


def test_low_priority_waits_and_is_not_forgotten() -> None:
    server = Server(max_running=1)
    server.submit("low", prompt_of(99, 20), 2, priority=-1)
    for n in range(60):
        server.submit(f"normal {n}", prompt_of(n, 20), 4, user="one of many")
    server.run()
    place = server.finished.index("low")
    assert 5 < place < 60, "after the age bound it counts as normal"


def test_who_is_swapped_out_and_too_long_for_a_stream_has_the_layout_changed() -> None:
    server = Server(n_cells=2048, n_seqs=8)
    pool = server.scheduler.pool
    keeper = LayoutKeeper(server.engine, server.scheduler, lambda: server.now)
    long = server.submit("long", prompt_of(1, 600), 20)
    server.step(3)
    server.scheduler.places.swap_out(long)
    server.submit("short", prompt_of(2, 20), 4)
    plan = StepPlan(pool.operations(), ())
    server.scheduler.commit(plan, server.engine.execute(plan))
    assert pool.make_movable(Layout.STREAMS, 8, 256)
    pool.rebuilt(server.engine.rebuild(pool.segments(), Layout.STREAMS, 8))
    server.step(4)
    assert long.swapped
    targets: list[Target] = []
    while not targets:
        server.step()
        targets = [target for target in (keeper.target(),) if target is not None]
    assert targets == [Target(Layout.UNIFIED, 8)]
    keeper.move(targets[0])
    server.run()
    assert set(server.finished) == {"short", "long"}


def test_operations_between_two_steps_are_no_tokens_computed() -> None:
    server = Server()
    server.submit("one", prompt_of(1, 40), 20)
    server.step(4)
    plan = StepPlan(server.scheduler.pool.operations(), ())
    server.scheduler.commit(plan, server.engine.execute(plan))
    assert server.scheduler.accounts.computed_tokens == 40


def test_layouts_other_than_unified_keep_the_limit_too() -> None:
    engine = FakeEngine(PoolShape(4000, 8, Layout.STREAMS))
    scheduler = Scheduler(engine, SchedulerSettings(check_invariants=True), still_store_for(engine, 1 << 20), lambda: 0.0)
    for n in range(6):
        request = Request(
            RequestId(f"r{n}"),
            tuple(prompt_of(n, 100)),
            20,
            GREEDY,
            Namespace("l"),
            "l",
            f"u{n}",
            allowance=Allowance(live_cells=260),
        )
        scheduler.submit(Task(request, 0.0, lambda: False))
    for _ in range(2000):
        if not scheduler.busy:
            break
        plan = scheduler.schedule()
        scheduler.commit(plan, engine.execute(plan))
        assert scheduler.pool.holdings.held_by.get(Namespace("l"), 0) <= 260
    assert not scheduler.busy


def test_whoever_asks_for_several_things_is_one_user_and_only_while_they_last() -> None:
    server = Server(max_running=1)
    for i, user in enumerate(("ada", "ada", "bob")):
        server.submit(f"{user} {i}", prompt_of(i, 40), 4, user=user)
    server.submit("another bob", prompt_of(3, 40), 4, tenant="other", user="bob")
    server.step(2)
    assert server.scheduler.statistics().users == 3, "one runs, the others wait"
    server.run()
    assert server.scheduler.statistics().users == 0
