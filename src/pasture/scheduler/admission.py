"""Who computes prompt tokens next: the waiting line, the promises of those who started, and the choice between them.

Fairness says who may start (`FairQueue`), promises say who had better wait (`Promises`), and among the rest the shortest
remaining prompt goes first, counted a head: a prompt that others wait for serves them all. Waiting makes a prompt count as
shorter, so a long one overtakes newcomers after a while, and past the age bound the oldest goes before everybody: on a server
that is behind for longer than that, it is first come, first served. Before all that come priorities, and then what tenants have
used lately: nobody is looked at while somebody goes before who is more urgent, or whose tenant has used much less. Whoever has
waited past the age bound counts as normal at least.

Nobody is ready whose tenant is at its limit of live cells, or would take idle cells that others are guaranteed, unless nothing
of that tenant runs: one request at a time always can. Engine thread.
"""

from __future__ import annotations

from collections import Counter

from pasture.core.ports import Clock
from pasture.core.values import RequestId
from pasture.kv.pool import Pool
from pasture.scheduler.fairness import FairQueue
from pasture.scheduler.promises import Promises
from pasture.scheduler.resting import Resting
from pasture.scheduler.settings import SchedulerSettings
from pasture.scheduler.task import Task
from pasture.scheduler.usage import Usage

MIN_GAIN_TOKENS = 8
"""waiting for somebody else's prefill must save at least this much: the first tokens of a chat template are not worth it"""
PATIENCE_SHARE = 0.5
"""a prompt that has waited this share of the age bound counts as a quarter of its length"""
HEADROOM_CELLS = 16
"""free cells a running request should find before another one starts or comes back"""
MAX_RISING = 16
"""requests looked up in slow tiers while every place is taken"""
REPLY_GUESS_TOKENS = 64
"""what a reply is taken to need at admission; a longer one grows into free cells, or has the youngest swapped out"""


class Admission:
    def __init__(self, pool: Pool, resting: Resting, settings: SchedulerSettings, clock: Clock) -> None:
        self.waiting = FairQueue()
        self.promises = Promises()
        self.usage = Usage(clock)
        self.running: dict[RequestId, Task] = {}
        """tasks with a sequence; `Places` changes it"""
        self._pool = pool
        self._resting = resting
        self._settings = settings
        self._clock = clock
        self._followers: Counter[Task] = Counter()
        """started task -> how many of those looked at last wait for its prefill"""

    def newcomers(self, n_running: int) -> list[Task]:
        """Waiting tasks that may start now, one a user."""
        self._followers.clear()
        if not len(self.waiting):
            return []
        if n_running >= self._settings.max_running or not self._pool.has_sequence_to_give:
            self._have_risen()
            return []
        return self._eligible()

    def first_in_line(self) -> Task | None:
        """Who would start next if there were a place."""
        self._followers.clear()
        return self.choose(self._eligible())

    def choose(self, candidates: list[Task]) -> Task | None:
        """The oldest when it has waited too long, else the one that is done soonest for the most people."""
        if not candidates:
            return None
        now = self._clock()
        candidates = self._first(candidates, now)
        oldest = min(candidates, key=lambda task: task.submitted_at)
        if now - oldest.submitted_at > self._settings.age_bound_seconds:
            return oldest
        return min(candidates, key=lambda task: (self._tokens_a_head(task, now), task.submitted_at))

    def cost(self, task: Task) -> int:
        """Tokens to compute for a waiting task, with a guess at its reply."""
        return len(task.tokens) - self._cached(task) + self.reply_guess(task)

    def cells_needed(self, task: Task, reply_tokens: int | None = None) -> int:
        """Cells that nobody running holds, and that the task will; `reply_tokens`: of its reply, a guess unless given."""
        reply = self.reply_guess(task) if reply_tokens is None else reply_tokens
        return self._pool.cells_to_lock(task.request.namespace, task.tokens) + reply

    def within_limit(self, task: Task) -> bool:
        """Whether its tenant may hold the cells that it needs beside those of its others that run, and others keep theirs."""
        namespace, evictor = task.request.namespace, self._pool.evictor
        limit = evictor.shares.limit(namespace)
        coming = sum(other.remaining for other in self.running.values())
        crowded = self._pool.used_cells + coming + len(task.tokens) + REPLY_GUESS_TOKENS > self._pool.shape.n_cells
        if limit is None and not crowded:
            return True
        others = [
            other
            for other in self.running.values()
            if other.request.namespace == namespace and other.request.priority >= task.request.priority
        ]
        if not others:
            return True
        needed = self.cells_needed(task)
        if crowded and needed + coming > self._pool.unlocked_cells - evictor.guaranteed_to_others(namespace):
            return False
        promised = sum(other.remaining for other in others)
        return limit is None or needed + promised <= evictor.room_for(namespace)

    def n_waiting_of_one(self) -> int:
        """How many wait for a first token where one tenant alone has asked lately.

        0 of several: they do not wait for each other, and who comes next, of another one, does not wait for a long step.
        """
        running = self.running.values()
        tenants = {task.request.tenant for task in running} | {name for name, _ in self.waiting.weights()}
        alone = len(tenants | self.usage.lately()) == 1
        return len(self.waiting) + sum(not task.n_generated for task in running) if alone else 0

    def _have_risen(self) -> None:
        """No place for anybody: what slow tiers have for those who will be next rises into RAM meanwhile."""
        for task in self.waiting.next_of_each(MAX_RISING):
            if not task.looked:
                self._resting.look(task)

    def _eligible(self) -> list[Task]:
        now = self._clock()
        return self.waiting.eligible(
            self._ready, self.cost, lambda task: self.urgency(task, now), lambda tasks: self._first(tasks, now)
        )

    def _first(self, tasks: list[Task], now: float) -> list[Task]:
        """Of these, all that nobody else goes before."""
        if len(tasks) < 2:
            return tasks
        urgent = max(self.urgency(task, now) for task in tasks)
        return self.usage.first([task for task in tasks if self.urgency(task, now) == urgent])

    def urgency(self, task: Task, now: float) -> int:
        """Its priority; whoever has waited past the age bound counts as normal at least."""
        late = now - task.submitted_at > self._settings.age_bound_seconds
        return max(task.request.priority, 0) if late else task.request.priority

    def _cached(self, task: Task) -> int:
        """Tokens that need not be computed, live or stored."""
        return max(task.stored_tokens, self._pool.lookup(task.request.namespace, task.tokens))

    @staticmethod
    def reply_guess(task: Task) -> int:
        return min(task.tokens_to_draw, REPLY_GUESS_TOKENS)

    def _tokens_a_head(self, task: Task, now: float) -> float:
        """Tokens to compute, divided among all who wait for them, and by how long its own request has waited."""
        remaining = task.remaining if task.sequence else self.cost(task)
        patience = 1 + (now - task.submitted_at) / (self._settings.age_bound_seconds * PATIENCE_SHARE)
        return remaining / (1 + self._followers[task]) / patience**2

    def _ready(self, task: Task) -> bool:
        """Whether a waiting task fits into a sequence, and has nothing to gain from a prefill, or a fetch, under way."""
        if len(task.tokens) >= self._pool.shape.cells_per_sequence:
            return False  # a long one among streams: the layout has to change first
        if not self._resting.look(task) or not self.within_limit(task):
            return False
        if not self._pool.joins:
            return True
        leader = task.leader
        if leader is None or leader.computed >= task.leader_length or leader.sequence is None:
            promised, leader = self.promises.longest(task)
            if leader is None or promised < self._cached(task) + MIN_GAIN_TOKENS:
                task.leader = None
                return True
            task.leader, task.leader_length = leader, promised
        self._followers[leader] += 1
        return False
