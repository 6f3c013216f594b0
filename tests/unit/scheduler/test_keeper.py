"""What becomes of requests when the layout that they need cannot be had."""

from __future__ import annotations

from collections.abc import Sequence

from pasture.core.errors import DoesNotFit, PromptTooLong
from pasture.core.values import (
    Finish,
    FinishReason,
    Form,
    Layout,
    PoolShape,
    Request,
    RequestId,
    SamplingParams,
    Segment,
)
from pasture.engine.fake import FakeEngine
from pasture.scheduler.keeper import MAX_LOOKED_AT, STAY_SECONDS, LayoutKeeper
from pasture.scheduler.layout import Target
from pasture.scheduler.scheduler import Scheduler
from pasture.scheduler.settings import SchedulerSettings
from pasture.scheduler.task import Task
from tests.store_support import still_store_for

HOME = Target(Layout.UNIFIED, 8)


class ShortOfMemory(FakeEngine):
    """Moves to streams and not back."""

    def rebuild(self, segments: Sequence[Segment], layout: Layout, n_seqs: int, form: Form | None = None) -> PoolShape:
        if (layout, n_seqs) == (HOME.layout, HOME.n_seqs):
            raise DoesNotFit("no memory")
        return super().rebuild(segments, layout, n_seqs, form)


class Server:
    """In streams of 256 cells."""

    def __init__(self, n_streams: int = 8) -> None:
        self.now = 0.0
        self.engine = ShortOfMemory(PoolShape(256 * n_streams, n_streams))
        store = still_store_for(self.engine, 1 << 20)
        self.scheduler = Scheduler(self.engine, SchedulerSettings(check_invariants=True), store, lambda: self.now)
        self.keeper = LayoutKeeper(self.engine, self.scheduler, lambda: self.now)
        self.keeper.move(Target(Layout.STREAMS, n_streams))
        self.finishes: dict[str, Finish] = {}

    def submit(self, name: str, n_tokens: int) -> None:
        prompt = tuple(range(n_tokens))
        request = Request(RequestId(name), prompt, 4, SamplingParams(temperature=0), user=name)
        self.scheduler.submit(Task(request, self.now, lambda: False))

    def step(self, n: int = 1) -> None:
        for _ in range(n):
            plan = self.scheduler.schedule()
            self.now += 0.1
            for task, event in self.scheduler.commit(plan, self.engine.execute(plan)):
                if event.finish is not None:
                    self.finishes[task.request.request_id] = event.finish


def test_newcomers_do_not_stall_behind_a_long_prompt_that_waits_for_another_layout() -> None:
    server = Server()
    server.submit("long", 600)
    server.step()
    server.now += 1000
    server.submit("short", 40)
    server.step(10)
    assert server.finishes["short"].reason is FinishReason.LENGTH
    assert "long" not in server.finishes


def test_a_layout_that_does_not_fit_is_tried_again_and_who_needed_it_is_told() -> None:
    server = Server()
    server.submit("long", 600)
    server.submit("short", 40)
    assert server.keeper.target() == HOME
    server.keeper.move(HOME)
    server.step(10)
    assert isinstance(server.finishes["long"].error, PromptTooLong)
    assert server.finishes["short"].reason is FinishReason.LENGTH
    server.submit("long again", 600)
    assert server.keeper.target() is None
    server.now += STAY_SECONDS
    server.submit("another", 40)
    assert server.keeper.target() == HOME


def test_a_long_prompt_is_seen_behind_any_number_of_others() -> None:
    server = Server(n_streams=128)
    for number in range(MAX_LOOKED_AT):
        server.submit(f"short {number}", 40)
    assert server.keeper.target() is None, "they are well where they are"
    server.submit("long", 600)
    assert server.keeper.target() == Target(Layout.UNIFIED, 128)
