"""Decides what each engine step computes, and books what it computed.

    plan = scheduler.schedule()          who decodes, who prefills how much, who starts, who is swapped
    result = engine.execute(plan)        the one place where time passes
    events = scheduler.commit(result)    tokens to their readers, cells into the tree

A step's work is *tokens per request*: one for a stream, a chunk for a prompt. Every stream whose reader keeps up is in every
step. Prompts share what the inter-token target leaves, shortest remaining first, the long-waiting before all. A request that
would compute what another is just computing waits for that one's cells. When cells run out somebody is swapped out whole and
comes back without recomputation (`places`); no running request fails for lack of room.

Owns the tasks; the pool owns cells. Knows no threads and no asyncio: `pasture.scheduler.loop` drives it on the engine thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from pasture.core.errors import DeadlineExceeded, EngineError, InvariantBroken, PastureError, PromptTooLong, RequestError
from pasture.core.ports import Clock, Engine
from pasture.core.statistics import SchedulerStatistics, SequenceState
from pasture.core.storage import Store
from pasture.core.values import (
    Allowance,
    Direction,
    Finish,
    FinishReason,
    Layout,
    Namespace,
    Outcome,
    RequestId,
    Sample,
    StepPlan,
    StepResult,
    TokenEvent,
    Work,
)
from pasture.kv.eviction import POLICIES
from pasture.kv.pool import Pool
from pasture.scheduler.accounts import Accounts
from pasture.scheduler.admission import HEADROOM_CELLS, Admission
from pasture.scheduler.ahead import Ahead
from pasture.scheduler.places import Places
from pasture.scheduler.resting import Resting
from pasture.scheduler.settings import SchedulerSettings
from pasture.scheduler.shaping import StepShaper
from pasture.scheduler.task import Task

MAX_FAILURES = 3
"""in a row, alone in a step, before a request is given up"""
MAX_ALONE_TOKENS = 256
"""in one step, for a request that is suspected of making the engine fail"""
Delivery = tuple[Task, TokenEvent]


class Scheduler:
    def __init__(
        self, engine: Engine, settings: SchedulerSettings, store: Store, clock: Clock, wake: Callable[[], None] = lambda: None
    ) -> None:
        """`wake` is called from other threads when there may be something to schedule. The store belongs to the caller."""
        self.settings = settings
        self.pool = Pool(
            engine.shape,
            clock=clock,
            share=settings.share_prefix,
            shareable=engine.model.shareable,
            policy=POLICIES[settings.policy],
        )
        self.resting = Resting(self.pool, store, engine.codec, clock, settings, wake)
        self.ahead = Ahead(self.pool, self.resting, clock, wake)
        self.admission = Admission(self.pool, self.resting, settings, clock)
        self.waiting = self.admission.waiting
        self.shaper = StepShaper(self.pool, settings.itl_target_seconds)
        self.accounts = Accounts()
        self.places = Places(self.pool, self.resting, self.admission, self.accounts, settings.max_running, clock)
        self.running, self.swapped = self.places.running, self.places.swapped
        self._engine = engine
        self._clock = clock
        self._tasks: dict[RequestId, Task] = {}
        self._planned: list[Task] = []
        self._suspects: list[Task] = []
        self._events: list[Delivery] = []
        self._n_streams = 0
        """of the tasks planned"""
        self._budget_tokens = 0
        self._step_at = 0.0
        self.in_peace: frozenset[str] | None = None
        """the tenants whose requests let the step end that was scheduled last; others' interrupt it (None: nobody's do)"""

    # Requests come and go

    @property
    def busy(self) -> bool:
        return bool(self._tasks)

    def submit(self, task: Task) -> None:
        request = task.request
        self._tasks[request.request_id] = task
        self.allow(request.namespace, request.allowance)
        self.waiting.push(task)
        self.accounts.submitted += 1

    def allow(self, namespace: Namespace, allowance: Allowance) -> None:
        """Somebody of this namespace asks for something, under these terms: what it may hold."""
        self.pool.evictor.shares.allow(namespace, allowance)
        self.resting.store.allow(namespace, allowance)

    def keep_for(self, seconds: Mapping[Namespace, float]) -> None:
        """How long KV of these namespaces is kept unused, in the live cache and below it; that of others for the usual time."""
        self.resting.keep_for(seconds)
        self.resting.store.keep_for(seconds)

    def cancel(self, request_id: RequestId) -> None:
        """Without effect when the request has ended."""
        task = self._tasks.get(request_id)
        if task is not None:
            self._end(task, FinishReason.CANCELLED)

    # One step

    def schedule(self) -> StepPlan:
        """The next step. A plan without works still has operations to carry out."""
        self._expire()
        self.ahead.expire()
        self._step_at = self._clock()
        self._planned, self._n_streams, self.in_peace = [], 0, None
        if not self._tasks and (plan := self.ahead.next()) is not None:
            self.in_peace = frozenset() if self.pool.cuttable else None
            return plan
        self.ahead.give_way()
        if self._suspects:
            return self._plan_suspect()
        self.places.make_way()
        works = [self._work(task, 1) for task in self._streams()]
        self._n_streams = len(works)
        self.places.resume(self._planned)
        self._fill(works)
        if not works and self.swapped and not self.running:
            self.places.resume_anybody()
            self._fill(works)
        if not works and any(not task.paused for task in self.running.values()):
            self._unjam(works)
        if self.pool.evictor.shares.limited:
            self._keep_within_limits()
        return self._plan(works)

    def _plan(self, works: list[Work]) -> StepPlan:
        if self.pool.shape.layout is Layout.STREAMS:
            # only neighbouring streams in ascending order share a micro-batch
            order = sorted(range(len(works)), key=lambda i: works[i].sequence)
            works = [works[i] if self._planned[i].decoding else self.shaper.padded(works[i]) for i in order]
            self._planned = [self._planned[i] for i in order]
        n_tokens = sum(len(work.tokens) for work in works)
        if self.pool.evictor.shares.limited:
            for task, work in zip(self._planned, works, strict=True):
                self.pool.evictor.keep_within(task.request.namespace, len(work.tokens))
        if n_tokens and not self.pool.make_room(n_tokens):
            raise InvariantBroken(f"a step of {n_tokens} tokens was planned, and they do not fit")
        return self.shaper.plan(works, self._n_streams)

    def commit(self, plan: StepPlan, result: StepResult) -> list[Delivery]:
        """Book a step's result; returns what readers get, in order."""
        self.resting.store.observe(result.transfers)
        self.resting.saved(result.saved)
        if plan.works and not self._planned:
            self.ahead.book(plan, result)
        elif result.outcome is Outcome.INTERRUPTED:
            self._begin_lost_again(result)
        elif result.outcome is Outcome.DONE:
            self._book(plan, result)
            self._suspects = [task for task in self._suspects if task not in self._planned]
        elif plan.works:
            self._recover(result)
        self._planned = []
        if self.settings.check_invariants:
            self.pool.check()
        return self.take_events()

    def end_all(self, reason: FinishReason, error: PastureError | None = None) -> list[Delivery]:
        """The engine is closed, or emptied and in doubt: every task ends, the pool's books start anew."""
        for task in list(self._tasks.values()):
            task.sequence = None
            self._end(task, reason, error)
        self._suspects, self._planned = [], []
        self.ahead.forget()
        self.resting.start_over()
        self.pool.reset(self._engine.shape)
        return self.take_events()

    def cancel_all(self) -> list[Delivery]:
        """The server ends: every task does, what was computed stays."""
        for request_id in list(self._tasks):
            self.cancel(request_id)
        return self.take_events()

    def end_too_long(self) -> None:
        """No other layout fits, and there is no room for them in this one: every conversation longer than a sequence ends."""
        longest = self.pool.shape.cells_per_sequence
        for task in list(self._tasks.values()):
            if len(task.tokens) >= longest:
                message = (
                    f"{len(task.tokens)} tokens; at present there is memory for {longest} in one conversation: try again later"
                )
                self._end(task, FinishReason.ERROR, PromptTooLong(message))

    def take_events(self) -> list[Delivery]:
        """Events that arose outside a step (cancellations, deadlines)."""
        events, self._events = self._events, []
        return events

    # Streams: every one of them, every step

    def _streams(self) -> list[Task]:
        streams = [t for t in self.running.values() if t.decoding and not t.paused and self._room_in_stream(t)]
        streams = self.admission.usage.thin_out(streams, self._prompts())
        while streams and (victim := self._in_the_way(streams)) is not None:
            self.places.swap_out(victim)
            streams = [task for task in streams if task is not victim]
        return streams[: self.pool.shape.n_batch]

    def _prompts(self) -> Iterator[Task]:
        """Prompts that are being computed, or might be in this step: of the waiting, the first of each tenant."""
        yield from (task for task in self.running.values() if not task.decoding and not task.paused)
        yield from self.waiting.heads()

    def _in_the_way(self, streams: list[Task]) -> Task | None:
        """Who has to go so that each of these can grow by a token; None when there is room."""
        if self.pool.evictor.shares.limited:
            for namespace, n in Counter(task.request.namespace for task in streams).items():
                if not self.pool.evictor.keep_within(namespace, n) and len(self.places.of(namespace)) > 1:
                    return self.places.last(namespace)
        return None if self.pool.make_room(len(streams)) else self.places.last()

    def _room_in_stream(self, task: Task) -> int:
        """Tokens by which its sequence can grow in this layout."""
        return self.pool.shape.cells_per_sequence - task.computed

    def _keep_within_limits(self) -> None:
        """Where a tenant's own limit lets none of its prompts go on, the last of them makes way, from the next step on."""
        working = {task.request.namespace for task in self.running.values() if task.decoding or task in self._planned}
        for namespace in {task.request.namespace for task in self.running.values()} - working:
            if self.pool.evictor.shares.limit(namespace) is not None and len(self.places.of(namespace)) > 1:
                self.places.swap_out(self.places.last(namespace))

    # Prompts: what the budget leaves

    def _fill(self, works: list[Work]) -> None:
        budget: int | None = None
        brief = False
        started = [t for t in self.running.values() if not t.decoding and not t.paused and t not in self._planned]
        may_start = True
        while budget is None or budget > 0:
            taken = sum(len(work.tokens) for work in works)
            newcomers = self.places.may_start(self.admission.newcomers(len(self.running))) if may_start else []
            task = self.admission.choose(started + newcomers)
            if task is None or self.admission.usage.stands_aside(task, self._planned[self._n_streams :]):
                return
            if task.sequence is not None:
                started.remove(task)
            elif not self._arm(task):
                continue
            elif not self._start(task, taken):
                self.places.turned_away = True
                may_start = self.places.swap_out_unread(self._planned)
                continue
            if budget is None:
                beside, brief = self._streams_beside(task, works), self.admission.usage.is_much(task)
                n_waiting = self.admission.n_waiting_of_one()
                budget = self._budget_tokens = self.shaper.prompt_share(beside, task, n_waiting, brief=brief)
                if brief and self.pool.cuttable:
                    self.in_peace = self.admission.usage.heavy(task)
            n = min(self._chunk(task, budget, brief=brief), self.pool.unlocked_cells - taken, self._room_in_stream(task))
            if n <= 0:
                return
            n = min(n, self._room_within_limit(task, works))
            if n <= 0:
                continue
            works.append(self._work(task, n))
            if self.pool.shape.layout is Layout.STREAMS:
                return  # two prompts would be cut into equal pieces, each shorter than a tile
            budget -= n

    def _streams_beside(self, task: Task, works: list[Work]) -> list[Work]:
        """The streams whose next tokens must not come late because of a prompt: not those that stand aside for it."""
        streams = self._planned[: self._n_streams]
        aside = self.admission.usage.aside_for(task, streams)
        return [work for stream, work in zip(streams, works[: self._n_streams], strict=True) if stream not in aside]

    def _chunk(self, task: Task, budget: int, *, brief: bool) -> int:
        """Tokens of a prompt for this step; in streams and the annex no rest is left that would be shorter than a tile.

        In a `brief` step, none that would be shorter than half a tile: a longer one is filled up.
        """
        n = min(budget, task.remaining)
        if task.save_at is not None:
            return min(n, task.save_at - task.computed)
        shape = self.pool.shape
        least = shape.tile_tokens // 2 if brief and shape.can_pad else shape.tile_tokens
        whole_tiles = shape.layout is Layout.STREAMS or task.computed + task.remaining <= shape.annex_cells
        if whole_tiles and task.remaining - n <= least:
            n = min(task.remaining, shape.n_batch - len(self._planned))
        return n

    def _room_within_limit(self, task: Task, works: list[Work]) -> int:
        """Cells that its tenant's limit leaves beside these works; idle ones of its own are given up for them."""
        namespace, evictor = task.request.namespace, self.pool.evictor
        if evictor.shares.limit(namespace) is None or len(self.places.of(namespace)) == 1:
            return task.remaining
        own = zip(self._planned, works, strict=True)
        return evictor.room_for(namespace) - sum(len(work.tokens) for t, work in own if t.request.namespace == namespace)

    def _start(self, task: Task, taken: int) -> bool:
        """Give a waiting task its sequence; False when there is no room for it now."""
        request, pool = task.request, self.pool
        if len(task.tokens) >= pool.shape.cells_per_sequence:
            return False  # a long one among streams: the layout has to change first
        needed = self.admission.cells_needed(task)
        self.places.short_of_cells |= needed > pool.unlocked_cells
        if self.running and needed + taken + HEADROOM_CELLS * len(self.running) > pool.unlocked_cells:
            return False
        charge = self.admission.cost(task)
        if not self.places.enter(task):
            return False
        self.waiting.remove(task, charge)
        self.ahead.came(request.namespace, task.tokens)
        task.leader = None
        if task.started_at is None:
            task.started_at = self._clock()
            task.cached_tokens = task.computed
            if task.timeline is not None:
                task.timeline.started(task.started_at)
            self.accounts.prompt_tokens += len(request.prompt)
            self.accounts.cached_tokens += task.computed
        return True

    def _arm(self, task: Task) -> bool:
        """Make its sampler; False when its parameters do not allow one, which ends the task."""
        if task.sampler is None:
            try:
                request = task.request
                task.sampler = self._engine.sampler(request.sampling, request.prompt, request.drawn_tokens)
            except RequestError as error:
                self._end(task, FinishReason.ERROR, error)
                return False
        return True

    def _work(self, task: Task, n: int) -> Work:
        sequence = task.sequence
        assert sequence is not None
        start = sequence.length
        last = n == task.remaining and task.tokens_to_draw > 0
        self._planned.append(task)
        return Work(sequence.id, task.tokens[start : start + n], start, task.sampler if last else None, task.request.n_logprobs)

    def _unjam(self, works: list[Work]) -> None:
        """Prompts fill the pool between them and none can go on: the youngest make way for the oldest."""
        while len(self.running) > 1:
            self.places.swap_out(self.places.last())
            self._fill(works)
            if works:
                return

    # Results

    def _book(self, plan: StepPlan, result: StepResult) -> None:
        if not plan.works:
            return  # `_n_streams` may be an earlier step's
        now = self._clock()
        rows = [(task, len(work.tokens)) for task, work in zip(self._planned, plan.works, strict=True)]
        self.admission.usage.charge(rows, result.decode_seconds)
        self.shaper.learn(plan, self._n_streams, result)
        self.resting.store.observe_prefill(self.shaper.costs.tokens_per_second)
        self.accounts.computed_tokens += plan.n_tokens - self._n_streams
        for task, work in zip(self._planned, plan.works, strict=True):
            sequence = task.sequence
            assert sequence is not None
            task.n_failures = 0
            if task.timeline is not None:
                moved = sum(move.seconds for move in result.transfers if move.direction is Direction.RESTORE)
                decodes = task.decoding
                task.timeline.step(self._step_at, now, len(work.tokens), decodes=decodes, restore_seconds=moved)
            self.pool.extend(sequence, task.tokens[work.start : work.start + len(work.tokens)])
            if task.save_at is not None and sequence.length >= task.save_at:
                if sequence.length == task.save_at:  # a task alone under suspicion may have passed it
                    self.resting.save(sequence)
                task.save_at = None
            sample = result.samples.get(work.sequence)
            if sample is not None:
                self._draw(task, sample, now)
            elif (error := result.refused.get(work.sequence)) is not None:
                self._end(task, FinishReason.ERROR, error)
            elif task.remaining == 0:
                self._end(task, FinishReason.LENGTH)  # max_tokens=0: only the prompt was wanted

    def _draw(self, task: Task, sample: Sample, now: float) -> None:
        request, token = task.request, sample.token
        event = TokenEvent(token, sample.logprobs)
        assert task.sequence is not None
        task.sequence.state = SequenceState.DECODING
        if task.first_token_at is None:
            task.first_token_at = now
            self.admission.promises.remove(task)
        if token in request.stop_tokens:
            self._end(task, FinishReason.STOP)
            return
        task.tokens.append(token)
        task.n_generated += 1
        self.accounts.generated_tokens += 1
        usage = task.usage(now) if task.n_generated == 1 else None
        if sample.is_last or task.tokens_to_draw == 0:
            self._end(task, FinishReason.STOP if sample.is_last else FinishReason.LENGTH, last=event)
        else:
            self._events.append((task, TokenEvent(token, event.logprobs, usage=usage) if usage else event))

    def _end(self, task: Task, reason: FinishReason, error: PastureError | None = None, last: TokenEvent | None = None) -> None:
        """The task's last event, and its resources back: its tokens stay in the pool as an idle sequence."""
        request_id = task.request.request_id
        del self._tasks[request_id]
        self.admission.promises.remove(task)
        if task in self.waiting:
            self.waiting.remove(task)
        self.running.pop(request_id, None)
        self.swapped.pop(request_id, None)
        self.resting.forget(task)
        if task.sequence is not None:
            self.resting.ended(task)
            self.pool.finish(task.sequence)
            task.sequence = None
        task.release_sampler()
        self.accounts.finished[reason] += 1
        usage = task.usage(self._clock())
        token, logprobs = (last.token, last.logprobs) if last is not None else (None, None)
        self._events.append((task, TokenEvent(token, logprobs, Finish(reason, usage, error), usage)))

    def _expire(self) -> None:
        now = self._clock()
        for task in list(self._tasks.values()):
            limit = task.request.deadline_seconds
            if limit is None:
                limit = self.settings.default_deadline_seconds
            if limit is not None and now - task.submitted_at > limit:
                error = DeadlineExceeded(f"the request did not finish within its {limit:g} s; ask for less, or raise the limit")
                self._end(task, FinishReason.ERROR, error)

    # When the engine fails

    def _recover(self, result: StepResult) -> None:
        """Nothing was computed. Try the tasks one by one: who fails alone is ended, the others go on."""
        tasks = [task for task in self._planned if task.request.request_id in self._tasks]
        self._begin_lost_again(result)
        if result.outcome is Outcome.NO_ROOM:
            self.pool.evict_idle("failure")
        if len(tasks) == 1:
            tasks[0].n_failures += 1
        if len(tasks) == 1 and tasks[0].n_failures >= MAX_FAILURES:
            self._suspects = [task for task in self._suspects if task is not tasks[0]]
            self._end(tasks[0], FinishReason.ERROR, EngineError("the engine could not compute this request"))
        elif not self._suspects:
            self._suspects = tasks

    def _begin_lost_again(self, result: StepResult) -> None:
        for task in self._planned:
            if task.request.request_id in self._tasks and task.sequence is not None and task.sequence.id in result.lost:
                self._restart(task)

    def _restart(self, task: Task) -> None:
        """Its sequence is gone from the engine: begin again, prompt and drawn tokens together."""
        assert task.sequence is not None
        task.looked = False
        self.pool.lose(task.sequence)
        self.admission.promises.remove(task)
        del self.running[task.request.request_id]
        task.sequence = None
        self.waiting.push(task)

    def _plan_suspect(self) -> StepPlan:
        works: list[Work] = []
        suspects = [t for t in self._suspects if t.request.request_id in self._tasks and not t.swapped]
        self._suspects = suspects
        while self._suspects and not works:
            task = self._suspects[0]
            if task.sequence is None and not (self._arm(task) and self._start(task, 0)):
                self._suspects.pop(0)
            elif self.pool.make_room(1):
                most = min(MAX_ALONE_TOKENS, self.pool.unlocked_cells, self.pool.shape.n_batch)
                works.append(self._work(task, min(task.remaining, most)))
            else:
                self.places.swap_out(task)
                self._suspects.pop(0)
        return self._plan(works)

    # Picture

    def statistics(self) -> SchedulerStatistics:
        """What the scheduler knows; refusals happen before it (`LocalService` counts them)."""
        accounts = self.accounts
        decoding = sum(task.decoding for task in self.running.values())
        return SchedulerStatistics(
            waiting=len(self.waiting),
            prefilling=len(self.running) - decoding,
            decoding=decoding,
            swapped=len(self.swapped),
            users=len({(task.request.namespace, task.request.user) for task in self._tasks.values()}),
            submitted_total=accounts.submitted,
            finished_total={str(reason): n for reason, n in accounts.finished.items()},
            rejected_total=0,
            swaps_total=accounts.swaps,
            prompt_tokens_total=accounts.prompt_tokens,
            cached_tokens_total=accounts.cached_tokens,
            computed_tokens_total=accounts.computed_tokens,
            ahead_tokens_total=self.ahead.computed_tokens,
            generated_tokens_total=accounts.generated_tokens,
            steps_total=accounts.steps,
            interrupted_steps_total=accounts.interrupted_steps,
            step_seconds_total=accounts.step_seconds,
            decode_seconds_total=accounts.decode_seconds,
            sample_seconds_total=accounts.sample_seconds,
            prefill_budget_tokens=self._budget_tokens,
            prefill_tokens_per_second=self.shaper.costs.tokens_per_second,
            layout_moves_total=accounts.layout_moves,
            shifts_total=accounts.shifts,
            invariant_failures_total=accounts.invariant_failures,
        )
