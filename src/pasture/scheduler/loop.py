"""The engine thread: the only one that touches the engine, the scheduler and the pool; it ends the store along with them.

    inbox (submissions, cancellations)  ->  schedule -> execute -> commit  ->  publish (events, one call a step)

Other threads talk to it through `submit`, `cancel`, `ask` and `stop`, and read `snapshot`, which is replaced whole. A request
that should not wait for the end of the step under way interrupts it; the next one is scheduled with it. When nothing runs the
thread carries out the operations that are left, checks the conservation law, compacts a fragmented cache, and sleeps until
something comes or an idle conversation has been unused for too long.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from pasture.core.errors import EngineError, InvariantBroken, PastureError, ShuttingDown
from pasture.core.ports import Clock, Engine
from pasture.core.statistics import PoolStatistics, SchedulerStatistics
from pasture.core.storage import Store
from pasture.core.values import FinishReason, Outcome, RequestId, StepPlan, StepResult
from pasture.scheduler.keeper import LayoutKeeper
from pasture.scheduler.rehearsal import rehearse
from pasture.scheduler.scheduler import Delivery, Scheduler
from pasture.scheduler.settings import SchedulerSettings
from pasture.scheduler.task import Task

log = logging.getLogger(__name__)

SNAPSHOT_SECONDS = 0.2
SNAPSHOT_SHARE = 0.02
"""of the thread's time that pictures of the pool may take while requests run"""
IDLE_SECONDS = 0.3
"""without work for this long before housekeeping: a closed loop of users leaves shorter gaps"""
LONGEST_IDLE_SECONDS = 3600.0
"""without a look at what may have expired"""
KEEP_SECONDS = 30.0
"""for writing what is live when the server ends"""
Publish = Callable[[list[Delivery]], None]
Snapshot = tuple[PoolStatistics, SchedulerStatistics]

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class _Question:
    reply: Callable[[Scheduler], None]
    cancel: Callable[[], object]


class EngineLoop:
    def __init__(
        self, engine: Engine, settings: SchedulerSettings, store: Store, publish: Publish, clock: Clock = time.monotonic
    ) -> None:
        self._inbox: deque[Task | RequestId | _Question] = deque()
        self._wake = threading.Condition()
        self._engine = engine
        self._publish = publish
        self._clock = clock
        self._store = store
        self._scheduler = Scheduler(engine, settings, store, clock, self.nudge)
        self._keeper = LayoutKeeper(engine, self._scheduler, clock)
        self._stopping = False
        self._at_once = False
        self._looked_at = clock()
        """into the inbox: when the step began"""
        self._nudged = False
        """since the thread last slept; under the lock of `_wake`"""
        self._in_peace: frozenset[str] | None = None
        """while a step runs, what the scheduler says of it; under the lock of `_wake`"""
        self._tidy = True
        self._snapshot_at = clock()
        self._draw_seconds = 0.0
        """that the last picture took"""
        self.snapshot: Snapshot = self._draw()
        self._thread = threading.Thread(target=self._run, name="pasture-engine", daemon=True)
        self._begun = threading.Event()

    def start(self) -> None:
        """Returns when requests can be computed."""
        self._thread.start()
        self._begun.wait()

    # From other threads

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    @property
    def ended(self) -> bool:
        """Whether the thread is gone, for good: by `stop`, or because the engine could not even be emptied."""
        return not self._thread.is_alive()

    def submit(self, task: Task) -> None:
        """Raises ShuttingDown when the thread has ended or is about to."""
        if not self._post(task):
            raise ShuttingDown("the server is shutting down; send the request to another one")

    def cancel(self, request_id: RequestId) -> None:
        self._post(request_id)

    def ask(self, question: Callable[[Scheduler], Answer]) -> Future[Answer]:
        """Have the engine thread call `question` between two steps, and carry out the operations that it leaves behind.

        Raises ShuttingDown when the thread has ended; the future is cancelled when it ends before it comes to that. What the
        question raises concerns nobody but who asked, unless it says that books and engine may disagree.
        """
        future: Future[Answer] = Future()

        def reply(scheduler: Scheduler) -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                answer = question(scheduler)
            except Exception as error:
                future.set_exception(error)
                if isinstance(error, EngineError | InvariantBroken):
                    raise
                return
            try:
                self._flush()
            except Exception as error:
                future.set_exception(error)
                raise
            future.set_result(answer)

        if not self._post(_Question(reply, future.cancel)):
            raise ShuttingDown("the server is shutting down")
        return future

    def nudge(self) -> None:
        """Something outside has changed (a reader caught up): look again."""
        with self._wake:
            self._nudged = True
            self._wake.notify()

    def stop(self, *, at_once: bool = False) -> None:
        """End every request with reason `cancelled`, close the engine, join the thread.

        `at_once`: the step under way is interrupted, and what is live is not kept.
        """
        with self._wake:
            self._stopping = True
            self._at_once |= at_once
            if at_once:
                self._engine.interrupt(True)
            self._wake.notify()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def _post(self, item: Task | RequestId | _Question) -> bool:
        with self._wake:
            if self._stopping:
                return False
            self._inbox.append(item)
            self._wake.notify()
            if isinstance(item, Task) and self._interrupts(item):
                self._engine.interrupt(True)
            return True

    # On the engine thread

    def _run(self) -> None:
        try:
            self._begin()
            while not self._stopping:
                self._looked_at = self._clock()
                self._read_inbox()
                if not self.step():
                    self._rest()
            self._deliver(self._scheduler.cancel_all())
            if not self._at_once:
                self._keep_everything()
        except Exception:
            log.exception("the engine thread failed; every request is ended")
            raise
        finally:
            self._begun.set()
            with self._wake:
                self._stopping = True  # from here on nothing is posted any more
            self._read_inbox(ending=True)
            self._deliver(self._scheduler.end_all(FinishReason.CANCELLED))
            self._store.close()
            self._engine.close()

    def _begin(self) -> None:
        if self._scheduler.settings.rehearse:
            try:
                rehearse(self._engine, self._scheduler.shaper.costs, self._store)
            except Exception as error:
                self._start_over(error)
        self._begun.set()

    def _keep_everything(self) -> None:
        """What is live goes to the store, where that outlives the process: the next start finds it."""
        if self._store.persistent:
            self._scheduler.resting.keep_everything()
            self._flush()
            if not self._store.flush(KEEP_SECONDS):
                log.warning(
                    "not everything could be written within %g s; the rest is computed again when asked for", KEEP_SECONDS
                )

    def _read_inbox(self, *, ending: bool = False) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, _Question):
                if ending:
                    item.cancel()
                else:
                    self._answer(item)
            elif isinstance(item, Task):
                self._scheduler.submit(item)
            else:
                self._scheduler.cancel(item)

    def _answer(self, question: _Question) -> None:
        try:
            question.reply(self._scheduler)
        except Exception as error:
            self._start_over(error)

    def step(self) -> bool:
        """One schedule, execute, commit, whatever becomes of it. False when there was nothing to do."""
        try:
            return self._step()
        except Exception as error:
            self._start_over(error)
            return True

    def _step(self) -> bool:
        self._follow_traffic()
        self._scheduler.resting.expire()
        demoted = self._scheduler.resting.demote()
        if demoted:
            self._flush()  # whoever waits to go on with it finds it in the store
            self._tidy = False
        plan = self._scheduler.schedule()
        if not plan.works and not plan.operations:
            self._deliver(self._scheduler.take_events())
            return demoted
        result = self._execute(plan)
        events = self._scheduler.commit(plan, result)
        self._tidy = False
        if plan.works and result.outcome is not Outcome.INTERRUPTED:
            self._keeper.observe(plan, result)
        self._deliver(events)
        if plan.works:
            self._scheduler.accounts.record_step(self._clock() - self._looked_at, result)
        return True

    def _execute(self, plan: StepPlan) -> StepResult:
        """Carry out a plan; a request that should not wait for its end interrupts it, where there is such a one."""
        if self._scheduler.in_peace is None:
            return self._engine.execute(plan)
        with self._wake:
            self._in_peace = self._scheduler.in_peace
            if any(isinstance(item, Task) and self._interrupts(item) for item in self._inbox):
                self._engine.interrupt(True)
        try:
            return self._engine.execute(plan)
        finally:
            with self._wake:
                self._in_peace = None
                self._engine.interrupt(self._at_once)

    def _interrupts(self, task: Task) -> bool:
        """Whether the step under way is one that this request had better not wait for. Under the lock of `_wake`."""
        return self._in_peace is not None and task.request.tenant not in self._in_peace

    def _follow_traffic(self) -> None:
        """Give the pool the layout and the form that suit who runs and waits, when the keeper says so."""
        target = self._keeper.target()
        if target is not None and self._keeper.make_movable(target):
            self._flush()
            self._keeper.move(target)
        form = self._keeper.shift()
        if form is not None and self._keeper.make_fit(form):
            self._flush()
            self._keeper.rewrite(form)
        if self._keeper.wants_compaction_at_once:
            self._flush()
            self._keeper.compact()

    def _flush(self) -> None:
        """Carry out the operations that are due, so that the engine's cells are what the books say."""
        if self._scheduler.pool.has_operations:
            plan = StepPlan(self._scheduler.pool.operations(), ())
            self._deliver(self._scheduler.commit(plan, self._engine.execute(plan)))

    def _deliver(self, events: list[Delivery]) -> None:
        ended = any(event.finish is not None for _, event in events)
        due = self._clock() - self._snapshot_at > max(SNAPSHOT_SECONDS, self._draw_seconds / SNAPSHOT_SHARE)
        if due or (ended and not self._scheduler.busy):
            self.snapshot = self._draw()
        elif ended or self._scheduler.accounts.submitted > self.snapshot[1].submitted_total:
            self.snapshot = self.snapshot[0], self._scheduler.statistics()  # who comes and goes quickly is seen all the same
        if events:
            self._publish(events)

    def _draw(self) -> Snapshot:
        started = self._clock()
        picture = self._scheduler.pool.statistics(), self._scheduler.statistics()
        self._snapshot_at = self._clock()
        self._draw_seconds = self._snapshot_at - started
        return picture

    def _start_over(self, error: Exception) -> None:
        """Books and engine may disagree: end what runs, empty the cache, go on. What is raised here ends the thread."""
        reason = str(error) if isinstance(error, PastureError) else type(error).__name__
        log.error("the engine thread failed, the live cache is emptied: %s", reason, exc_info=error)
        if isinstance(error, InvariantBroken):
            self._scheduler.accounts.invariant_failures += 1
        self._engine.rebuild((), self._engine.shape.layout, self._engine.shape.n_seqs)
        self._deliver(self._scheduler.end_all(FinishReason.ERROR, EngineError(f"the engine failed: {reason}")))

    # Nothing to do

    def _rest(self) -> None:
        self.snapshot = self._draw()
        with self._wake:
            if self._inbox or self._stopping or self._nudged:
                self._nudged = False
                return
            paused = self._scheduler.busy
            due = self._scheduler.resting.expires_in()
            idle = (None if due is None else min(due, LONGEST_IDLE_SECONDS)) if self._tidy else IDLE_SECONDS
            woken = self._wake.wait(timeout=0.05 if paused else idle) or self._nudged
            self._nudged = False
        if not woken and not paused and not self._tidy:
            self._housekeeping()

    def _housekeeping(self) -> None:
        self._tidy = True
        try:
            self._scheduler.pool.check()
            while not self._inbox and self._scheduler.resting.copy_idle():
                self._flush()
            if self._keeper.wants_compaction:
                self._keeper.compact()
                self.snapshot = self._draw()
        except Exception as error:
            self._start_over(error)
