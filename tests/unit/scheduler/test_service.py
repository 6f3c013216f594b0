"""The service over the fake engine: sharing, limits, readers, endings."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from pasture.core.errors import DeadlineExceeded, DoesNotFit, EngineError, PromptTooLong, QueueFull, RequestError, ShuttingDown
from pasture.core.values import (
    DEFAULT_NAMESPACE,
    Finish,
    FinishReason,
    Form,
    Layout,
    Outcome,
    PoolShape,
    Request,
    RequestId,
    SamplingParams,
    Save,
    Segment,
    StepPlan,
    StepResult,
)
from pasture.engine.fake import FakeEngine, expected_reply
from pasture.scheduler.service import LocalService
from pasture.scheduler.settings import LayoutChoice, SchedulerSettings
from pasture.scheduler.usage import Usage
from tests.store_support import store_for

GREEDY = SamplingParams(temperature=0.0)
SYSTEM = tuple(i % 250 for i in range(700))
SHAPE = PoolShape(8192, 64)


class GatedEngine(FakeEngine):
    """Computes a step only when the test lets it."""

    def __init__(self, shape: PoolShape) -> None:
        super().__init__(shape)
        self.broken: Exception | None = None
        self.lost = False
        self.n_failed_rebuilds = 0

    def execute(self, plan: StepPlan) -> StepResult:
        if self.broken is not None and plan.works:
            raise self.broken
        return super().execute(plan)

    def rebuild(self, segments: Sequence[Segment], layout: Layout, n_seqs: int, form: Form | None = None) -> PoolShape:
        if self.lost or (self.broken is not None and segments):
            self.n_failed_rebuilds += 1
            raise EngineError("out of order")
        return super().rebuild(segments, layout, n_seqs, form)


class PatientEngine(FakeEngine):
    """While `patient`, a step takes until somebody interrupts it, five seconds at most."""

    def __init__(self) -> None:
        super().__init__(SHAPE)
        self.patient = False
        self.begun = threading.Event()

    def execute(self, plan: StepPlan) -> StepResult:
        if self.patient and plan.works:
            self.begun.set()
            self.interrupted.wait(5.0)
        return super().execute(plan)


def request(name: str, prompt: tuple[int, ...], max_tokens: int = 8, **fields: float) -> Request:
    return Request(RequestId(name), prompt, max_tokens, GREEDY, user=name, deadline_seconds=fields.get("deadline"))


async def collect(service: LocalService, asked: Request) -> tuple[list[int], Finish]:
    tokens: list[int] = []
    async for event in service.generate(asked):
        if event.token is not None:
            tokens.append(event.token)
        if event.finish is not None:
            return tokens, event.finish
    raise AssertionError("a stream without an end")


@contextlib.contextmanager
def served(engine: FakeEngine, **options: object) -> Iterator[LocalService]:
    scheduling = SchedulerSettings(check_invariants=True, **options)  # type: ignore[arg-type]
    service = LocalService(engine, store_for(engine), scheduling)
    try:
        yield service
    finally:
        service.close()


async def settled(service: LocalService) -> None:
    """Wait until the engine thread has let go of everything."""
    for _ in range(400):
        pool, scheduler = service.statistics().pool, service.statistics().scheduler
        if not (scheduler.waiting + scheduler.prefilling + scheduler.decoding + pool.running_cells):
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"requests are left: {service.statistics()}")


@pytest.mark.parametrize("staggered", [False, True])
async def test_a_prefix_that_many_ask_for_at_once_is_computed_once(staggered: bool) -> None:
    engine = FakeEngine(SHAPE)
    with served(engine) as service:

        async def one(i: int) -> tuple[list[int], Finish]:
            if staggered:
                await asyncio.sleep(0.002 * i)
            return await collect(service, request(f"user{i}", (*SYSTEM, 251, i)))

        results = await asyncio.gather(*(one(i) for i in range(16)))
    for i, (tokens, finish) in enumerate(results):
        assert tokens == expected_reply((*SYSTEM, 251, i), 8, GREEDY)
        assert finish.usage.prompt_tokens == 702
    computed = sum(finish.usage.prompt_tokens - finish.usage.cached_tokens for _, finish in results)
    assert computed <= 1.05 * (len(SYSTEM) + 2 * 16)


async def test_the_next_turn_computes_only_what_is_new() -> None:
    with served(FakeEngine(SHAPE)) as service:
        reply, _ = await collect(service, request("first", SYSTEM))
        _, finish = await collect(service, request("second", (*SYSTEM, *reply, 1, 2, 3)))
    assert finish.usage.prompt_tokens - finish.usage.cached_tokens == 4  # the last reply token was never computed


async def test_five_hundred_clients_that_vanish_leave_nothing_behind() -> None:
    engine = FakeEngine(PoolShape(4096, 32))
    with served(engine, max_waiting=1000) as service:
        tasks_before = len(asyncio.all_tasks())

        async def vanish(i: int) -> None:
            stream = service.generate(request(f"v{i}", (*SYSTEM[: 50 + i % 300], i % 251), 400))
            with contextlib.suppress(asyncio.TimeoutError):
                async with asyncio.timeout(0.001 * (i % 37)):
                    async for _ in stream:
                        if i % 5 == 0:
                            break
            await stream.aclose()

        await asyncio.gather(*(vanish(i) for i in range(500)))
        await settled(service)
        statistics = service.statistics()
        assert statistics.pool.running_cells == 0
        assert all(sequence.request_id is None for sequence in statistics.pool.sequences)
        assert len(asyncio.all_tasks()) == tasks_before
        tokens, _ = await collect(service, request("last", SYSTEM))
    assert tokens == expected_reply(SYSTEM, 8, GREEDY)


async def test_four_times_more_requests_than_cells_all_finish_by_swapping() -> None:
    engine = FakeEngine(PoolShape(512, 32))
    with served(engine) as service:
        asked = [request(f"u{i}", (i, *range(60)), 200) for i in range(8)]
        results = await asyncio.gather(*(collect(service, r) for r in asked))
        swaps = service.statistics().scheduler.swaps_total
    assert swaps > 0
    assert engine.n_computed < sum(61 + 200 for _ in asked) * 1.01
    for r, (tokens, finish) in zip(asked, results, strict=True):
        assert finish.reason is FinishReason.LENGTH
        assert tokens == expected_reply(r.prompt, 200, GREEDY)


async def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    with served(FakeEngine(PoolShape(512, 4))) as service:
        with pytest.raises(PromptTooLong, match="can hold 512"):
            await collect(service, request("big", tuple(range(250)) * 2, 100))
        with pytest.raises(PromptTooLong, match="can hold 512"):
            await collect(service, request("full", tuple(range(256)) * 2, 0))
        with pytest.raises(RequestError, match="empty"):
            await collect(service, request("none", ()))


async def test_streams_limit_the_length_and_auto_does_not() -> None:
    long = request("long", tuple(range(200)), 100)
    streams = FakeEngine(PoolShape(1024, 4, Layout.STREAMS))
    with served(streams, layout=LayoutChoice.STREAMS) as service, pytest.raises(PromptTooLong, match="can hold 256"):
        await collect(service, long)
    with served(FakeEngine(PoolShape(1024, 4)), layout=LayoutChoice.AUTO) as service:
        assert (await collect(service, long))[0] == expected_reply(long.prompt, 100, GREEDY)


async def test_a_full_line_is_refused_with_a_time_to_come_back() -> None:
    with served(FakeEngine(PoolShape(512, 1)), max_waiting=3) as service:
        streams = [service.generate(request(f"u{i}", (i, 1, 2), 400)) for i in range(12)]
        outcomes = await asyncio.gather(*(anext(stream) for stream in streams), return_exceptions=True)
        refused = [outcome for outcome in outcomes if isinstance(outcome, QueueFull)]
        assert refused
        assert all(1 <= refusal.retry_after_seconds <= 60 for refusal in refused)
        assert service.statistics().scheduler.rejected_total == len(refused)
        for stream in streams:
            await stream.aclose()


async def test_a_deadline_ends_the_request() -> None:
    with served(FakeEngine(SHAPE)) as service:
        with pytest.raises(DeadlineExceeded, match="0 s"):
            await collect(service, request("late", SYSTEM, deadline=0.0))
        await settled(service)


async def test_impossible_sampling_ends_only_that_request() -> None:
    class Picky(FakeEngine):
        def sampler(self, params: SamplingParams, prompt: object, n_drawn: int = 0) -> object:  # type: ignore[override]
            if params.top_k == 13:
                raise RequestError("no thirteen", param="top_k")
            return super().sampler(params, ())

    with served(Picky(SHAPE)) as service:
        bad = Request(RequestId("bad"), SYSTEM, 8, SamplingParams(top_k=13))
        good, refused = await asyncio.gather(
            collect(service, request("good", SYSTEM)), collect(service, bad), return_exceptions=True
        )
        assert isinstance(refused, RequestError)
        assert not isinstance(good, BaseException)
        assert good[0] == expected_reply(SYSTEM, 8, GREEDY)


@pytest.mark.parametrize("error", [EngineError("out of order"), MemoryError()])
async def test_a_broken_engine_ends_what_runs_and_serves_again(error: Exception) -> None:
    engine = GatedEngine(SHAPE)
    with served(engine) as service:
        engine.broken = error
        _, finish = await collect(service, request("hit", SYSTEM))
        assert finish.reason is FinishReason.ERROR
        assert isinstance(finish.error, EngineError)
        engine.broken = None
        tokens, _ = await collect(service, request("next", SYSTEM))
        assert tokens == expected_reply(SYSTEM, 8, GREEDY)


async def test_a_compaction_that_fails_while_nobody_asks_empties_the_cache_and_no_more() -> None:
    engine = GatedEngine(SHAPE)
    with served(engine) as service:
        await asyncio.gather(*(collect(service, request(f"u{i}", (i, *range(100)), 150)) for i in range(4)))
        engine.broken = MemoryError()
        for _ in range(400):
            if engine.n_failed_rebuilds:
                break
            await asyncio.sleep(0.01)
        assert engine.n_failed_rebuilds == 1
        engine.broken = None
        tokens, _ = await collect(service, request("next", SYSTEM))
        assert tokens == expected_reply(SYSTEM, 8, GREEDY)


async def test_a_compaction_for_which_there_is_no_memory_loses_nothing() -> None:
    class Crowded(FakeEngine):
        n_refused = 0

        def rebuild(self, segments: Sequence[Segment], layout: Layout, n_seqs: int, form: Form | None = None) -> PoolShape:
            self.n_refused += 1
            raise DoesNotFit("no memory")

    engine = Crowded(SHAPE)
    with served(engine) as service:
        asked = [request(f"u{i}", (i, *range(100)), 150) for i in range(4)]
        replies = await asyncio.gather(*(collect(service, r) for r in asked))
        for _ in range(400):
            if engine.n_refused:
                break
            await asyncio.sleep(0.01)
        turn = request("next", (*asked[0].prompt, *replies[0][0], 9))
        tokens, finish = await collect(service, turn)
    assert engine.n_refused == 1
    assert finish.usage.cached_tokens == len(turn.prompt) - 2
    assert tokens == expected_reply(turn.prompt, 8, GREEDY)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_an_engine_that_cannot_even_be_emptied_ends_the_service_which_says_so() -> None:
    engine = GatedEngine(SHAPE)
    with served(engine) as service:
        assert service.alive
        engine.broken, engine.lost = EngineError("out of order"), True
        _, finish = await collect(service, request("hit", SYSTEM))
        assert finish.reason is not FinishReason.LENGTH
        for _ in range(400):
            if not service.alive:
                break
            await asyncio.sleep(0.01)
        assert not service.alive
        with pytest.raises(ShuttingDown):
            await collect(service, request("late", SYSTEM))
    assert engine.closed


async def test_a_failed_decode_is_tried_again() -> None:
    engine = FakeEngine(SHAPE)
    engine.fail_next(Outcome.FAILED, Outcome.NO_ROOM)
    with served(engine) as service:
        results = await asyncio.gather(*(collect(service, request(f"u{i}", (*SYSTEM, i))) for i in range(4)))
    assert [tokens for tokens, _ in results] == [expected_reply((*SYSTEM, i), 8, GREEDY) for i in range(4)]


async def test_a_slow_reader_is_paused_and_loses_nothing() -> None:
    with served(FakeEngine(SHAPE), max_unread_tokens=4) as service:
        tokens = []
        async for event in service.generate(request("slow", SYSTEM, 60)):
            if event.token is not None:
                tokens.append(event.token)
            await asyncio.sleep(0.001)
    assert tokens == expected_reply(SYSTEM, 60, GREEDY)


async def test_drain_finishes_what_runs_and_takes_nothing_new() -> None:
    with served(FakeEngine(SHAPE)) as service:
        stream = service.generate(request("running", SYSTEM, 200))
        await anext(stream)
        draining = asyncio.create_task(service.drain())
        await asyncio.sleep(0)
        assert not service.ready
        with pytest.raises(ShuttingDown):
            await collect(service, request("new", SYSTEM))
        rest = [event async for event in stream]
        await draining
    assert rest[-1].finish is not None
    assert rest[-1].finish.reason is FinishReason.LENGTH


async def test_it_is_quiet_when_the_last_request_has_ended() -> None:
    with served(FakeEngine(SHAPE)) as service:
        await service.quiet()
        for _ in range(2):
            streams = [service.generate(request(name, SYSTEM, 20)) for name in ("one", "two")]
            for stream in streams:
                await anext(stream)
            waiting = [asyncio.create_task(service.quiet()) for _ in range(2)]
            assert [event async for event in streams[0]]
            await asyncio.sleep(0)
            assert not any(task.done() for task in waiting)
            assert [event async for event in streams[1]]
            async with asyncio.timeout(5):
                await asyncio.gather(*waiting)


async def test_close_cancels_what_runs_and_frees_the_engine() -> None:
    engine = FakeEngine(SHAPE)
    service = LocalService(engine, store_for(engine))
    stream = service.generate(request("running", SYSTEM, 5000))
    await anext(stream)
    service.close()
    rest = [event async for event in stream]
    assert rest[-1].finish is not None
    assert rest[-1].finish.reason is FinishReason.CANCELLED
    assert engine.closed
    with pytest.raises(ShuttingDown):
        await collect(service, request("late", SYSTEM))


async def test_sharing_off_computes_everything() -> None:
    engine = FakeEngine(SHAPE)
    with served(engine, share_prefix=False) as service:
        results = await asyncio.gather(*(collect(service, request(f"u{i}", (*SYSTEM, i))) for i in range(3)))
    assert all(finish.usage.cached_tokens == 0 for _, finish in results)
    assert [tokens for tokens, _ in results] == [expected_reply((*SYSTEM, i), 8, GREEDY) for i in range(3)]


async def test_max_tokens_zero_only_warms_the_cache() -> None:
    with served(FakeEngine(SHAPE)) as service:
        tokens, finish = await collect(service, request("warm", SYSTEM, 0))
        assert (tokens, finish.reason) == ([], FinishReason.LENGTH)
        _, finish = await collect(service, request("user", (*SYSTEM, 5)))
        assert finish.usage.cached_tokens == len(SYSTEM)


async def test_an_idle_server_compacts_a_fragmented_cache_and_loses_nothing() -> None:
    with served(FakeEngine(SHAPE)) as service:
        asked = [request(f"u{i}", (i, *range(100)), 150) for i in range(4)]
        replies = [tokens for tokens, _ in await asyncio.gather(*(collect(service, r) for r in asked))]
        for _ in range(400):
            if service.statistics().pool.compactions:
                break
            await asyncio.sleep(0.01)
        pool = service.statistics().pool
        assert pool.compactions == 1
        assert pool.fragmentation == 0
        turns = [request(f"next{r.user}", (*r.prompt, *reply, 9)) for r, reply in zip(asked, replies, strict=True)]
        for turn, (tokens, finish) in zip(turns, [await collect(service, turn) for turn in turns], strict=True):
            assert finish.usage.cached_tokens == len(turn.prompt) - 2
            assert tokens == expected_reply(turn.prompt, 8, GREEDY)


@pytest.mark.parametrize(("tiles", "target", "compacts"), [(True, 0.4, True), (True, 1e-9, False), (False, 0.4, False)])
async def test_a_full_pool_is_compacted_beside_requests_where_that_is_quick_and_pays(
    tiles: bool, target: float, compacts: bool
) -> None:
    shape = PoolShape(1024, 8, tile_tokens=64 if tiles else 1, can_pad=tiles)
    with served(FakeEngine(shape), itl_target_seconds=target) as service:
        asked = [request(f"u{i}", tuple((i * 7 + j * (i + 1)) % 250 for j in range(230)), 12) for i in range(12)]
        results = await asyncio.gather(*(collect(service, r) for r in asked))
        compactions = service.statistics().pool.compactions
    assert (compactions > 0) == compacts
    for r, (tokens, _) in zip(asked, results, strict=True):
        assert tokens == expected_reply(r.prompt, 12, GREEDY)


async def test_private_traffic_moves_to_streams_by_itself_and_every_text_stays() -> None:
    with served(FakeEngine(PoolShape(32768, 64)), layout=LayoutChoice.AUTO) as service:
        asked = [request(f"u{i}", tuple((i * 7 + j) % 250 for j in range(900)), 40) for i in range(12)]
        results = await asyncio.gather(*(collect(service, r) for r in asked))
        statistics = service.statistics()
        turns = [request(f"n{i}", (*r.prompt, *reply, 5)) for i, (r, (reply, _)) in enumerate(zip(asked, results, strict=True))]
        again = await asyncio.gather(*(collect(service, turn) for turn in turns))
    assert statistics.scheduler.layout_moves_total >= 1
    assert statistics.pool.shape.layout is Layout.STREAMS
    for r, (tokens, _) in zip((*asked, *turns), (*results, *again), strict=True):
        assert tokens == expected_reply(r.prompt, r.max_tokens, GREEDY)
    assert all(finish.usage.cached_tokens == len(turn.prompt) - 2 for turn, (_, finish) in zip(turns, again, strict=True))


async def test_a_pool_that_stays_short_of_cells_is_rewritten_smaller_and_every_text_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pasture.scheduler.shift.SHORT_SECONDS", 0.0)
    monkeypatch.setattr("pasture.scheduler.shift.AMPLE_SECONDS", 0.0)
    with served(FakeEngine(PoolShape(1024, 32)), shift_to=Form.Q8_0) as service:
        asked = [request(f"u{i}", (i, *range(200)), 100) for i in range(12)]
        results = await asyncio.gather(*(collect(service, r) for r in asked))
        crowded = service.statistics()
        last = request("alone", tuple(range(100, 140)), 60)
        reply, _ = await collect(service, last)
        alone = service.statistics()
    assert crowded.scheduler.shifts_total >= 1
    assert alone.scheduler.shifts_total > crowded.scheduler.shifts_total or crowded.scheduler.shifts_total > 1
    assert alone.pool.shape.form is Form.RAW
    assert alone.pool.shape.n_cells == 1024
    for r, (tokens, _) in zip(asked, results, strict=True):
        assert tokens == expected_reply(r.prompt, r.max_tokens, GREEDY)
    assert reply == expected_reply(last.prompt, 60, GREEDY)


async def test_nothing_is_saved_where_nothing_can_be_kept() -> None:
    engine = FakeEngine(PoolShape(512, 8))
    service = LocalService(engine, store_for(engine, ram_bytes=0), SchedulerSettings(check_invariants=True))
    saves = 0
    execute = engine.execute

    def counting(plan: StepPlan) -> StepResult:
        nonlocal saves
        saves += sum(isinstance(operation, Save) for operation in plan.operations)
        return execute(plan)

    engine.execute = counting  # type: ignore[method-assign]
    for i in range(6):
        await collect(service, request(f"u{i}", (i, *range(150))))
    service.close()
    assert service.statistics().pool.evicted_cells
    assert saves == 0


async def test_a_request_interrupts_what_is_computed_ahead() -> None:
    engine = PatientEngine()
    with served(engine) as service:
        engine.patient = True
        service.anticipate(DEFAULT_NAMESPACE, tuple(range(100)), typing=True)
        assert await asyncio.to_thread(engine.begun.wait, 5.0)
        engine.patient = False
        tokens, _ = await asyncio.wait_for(collect(service, request("r", SYSTEM)), 4.0)
        assert tokens == expected_reply(SYSTEM, 8, GREEDY)
        assert service.statistics().scheduler.interrupted_steps_total == 1


async def test_who_used_little_interrupts_a_step_of_who_used_much_and_nobody_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Usage, "is_much", lambda self, task: task.request.tenant == "greedy")
    monkeypatch.setattr(Usage, "heavy", lambda self, task: frozenset({"greedy"}))
    engine = PatientEngine()
    with served(engine) as service:
        engine.patient = True
        prompts = (7, *SYSTEM), (8, *SYSTEM)
        asked = [replace(request(f"g{i}", prompt), tenant="greedy") for i, prompt in enumerate(prompts)]
        greedy = [asyncio.create_task(collect(service, asked[0]))]
        assert await asyncio.to_thread(engine.begun.wait, 5.0)
        greedy.append(asyncio.create_task(collect(service, asked[1])))
        await asyncio.sleep(0.05)
        assert not engine.interrupted.is_set()
        engine.patient = False
        tokens, _ = await asyncio.wait_for(collect(service, replace(request("c", SYSTEM), tenant="calm")), 4.0)
        assert tokens == expected_reply(SYSTEM, 8, GREEDY)
        assert [tokens for tokens, _ in await asyncio.gather(*greedy)] == [expected_reply(p, 8, GREEDY) for p in prompts]
        assert service.statistics().scheduler.interrupted_steps_total == 1


@pytest.mark.parametrize("at_once", [False, True])
async def test_what_is_live_is_kept_unless_the_end_is_at_once(at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(SHAPE)
    store = store_for(engine)
    monkeypatch.setattr(type(store), "persistent", True)
    flushed: list[float] = []

    def flush(seconds: float) -> bool:
        flushed.append(seconds)
        return True

    monkeypatch.setattr(store, "flush", flush)
    service = LocalService(engine, store, SchedulerSettings(check_invariants=True))
    await collect(service, request("r", SYSTEM))
    service.close(at_once=at_once)
    assert bool(flushed) is not at_once


async def test_at_the_end_readers_are_told_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = PatientEngine()
    store = store_for(engine)
    may_end = threading.Event()
    monkeypatch.setattr(type(store), "persistent", True)
    monkeypatch.setattr(store, "flush", lambda _: may_end.wait(10.0))
    service = LocalService(engine, store, SchedulerSettings(check_invariants=True))
    asked = asyncio.create_task(collect(service, request("r", SYSTEM, 4000)))
    while not service.statistics().scheduler.generated_tokens_total:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    closing = asyncio.create_task(asyncio.to_thread(service.close))
    _, finish = await asyncio.wait_for(asked, 5.0)
    assert finish.reason is FinishReason.CANCELLED
    assert not closing.done()
    may_end.set()
    await closing


async def test_who_comes_soon_after_the_last_picture_is_in_the_numbers() -> None:
    engine = PatientEngine()
    with served(engine) as service:
        for number in range(3):  # each ends with a picture
            await collect(service, request(f"r{number}", SYSTEM))
            engine.patient = True
            asked = asyncio.create_task(collect(service, request(f"s{number}", (7, *SYSTEM), 40)))
            assert await asyncio.to_thread(engine.begun.wait, 5.0)
            engine.patient = False
            engine.interrupt(True)
            engine.interrupt(False)
            async with asyncio.timeout(5):
                while not service.statistics().scheduler.users and not asked.done():  # noqa: ASYNC110
                    await asyncio.sleep(0)
            seen = service.statistics().scheduler.users
            await asked
            engine.begun.clear()
            assert seen == 1
