"""Who has a sequence, who had to give it up, and who makes way for whom.

A request that runs gives its place up, is swapped out whole, and comes back without recomputation, when

    cells run out                          the last to come of the lowest priority, a request whose reader does not read first
    its tenant is at its limit of cells    the last to come of that tenant
    somebody goes before it                who waits has a higher priority, or the same and a tenant that runs much less

A tenant runs much less when, by weight, it would run at most half as much as the other even after the change: so each change
makes things fairer, and there is no way back. Nobody comes back into the place that somebody else was given. Engine thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from pasture.core.ports import Clock
from pasture.core.statistics import SequenceState
from pasture.core.values import Namespace, RequestId
from pasture.kv.pool import Pool
from pasture.scheduler.accounts import Accounts
from pasture.scheduler.admission import HEADROOM_CELLS, Admission
from pasture.scheduler.resting import Resting
from pasture.scheduler.task import Task

MUCH_MORE = 2.0
"""times what another tenant runs: from there on its requests make way for that one's"""


class Places:
    """Owns the tasks that run and those that are swapped out."""

    def __init__(
        self, pool: Pool, resting: Resting, admission: Admission, accounts: Accounts, max_running: int, clock: Clock
    ) -> None:
        self.running = admission.running
        """tasks with a sequence"""
        self.swapped: dict[RequestId, Task] = {}
        self.short_of_cells = False
        """a request had to wait, or to go, for lack of cells since this was last set to False"""
        self.turned_away = False
        """somebody waited for a place in the step before this one"""
        self._pool = pool
        self._resting = resting
        self._admission = admission
        self._accounts = accounts
        self._max_running = max_running
        self._clock = clock
        self._way_for: Task | None = None
        """for whom somebody was swapped out last"""

    # In

    def enter(self, task: Task) -> bool:
        """Give a task a sequence with all that is there of its tokens already; False when there is none to give."""
        task.sequence = self._resting.enter(task)
        if task.sequence is None:
            return False
        task.sequence.state = SequenceState.DECODING if task.decoding else SequenceState.PREFILLING
        task.save_at = self._resting.branch_point(task)
        self.running[task.request.request_id] = task
        if not task.n_generated:
            self._admission.promises.add(task)
        return True

    def resume(self, planned: Collection[Task]) -> None:
        """Bring swapped requests back, while there is room for them and for everyone's next tokens.

        `planned`: whose next token is in this step. A request whose reader is behind makes way.
        """
        if not self.swapped:
            return
        if self._way_for is not None and self._way_for not in self._admission.waiting:
            self._way_for = None
        counts = self._counts()
        unread = [other for other in self.running.values() if other.paused and other not in planned]
        for task in sorted(self.swapped.values(), key=lambda task: (-task.request.priority, task.submitted_at)):
            if task.paused or task.n_saves:
                continue
            if len(task.tokens) >= self._pool.shape.cells_per_sequence:
                continue  # a long one, and streams since it left: the layout has to change first
            if self._way_for is not None and self._goes_before(self._way_for, task, counts):
                continue
            limited = not self._admission.within_limit(task)
            if limited or not self._has_way_back(task, len(planned)):
                others = [other for other in unread if not limited or other.request.namespace == task.request.namespace]
                made = self._make_way_back(task, others, len(planned))
                unread = [other for other in unread if other.sequence is not None]
                if not made and limited:
                    continue
                if not made:
                    return
            if not self.enter(task):
                return
            del self.swapped[task.request.request_id]

    def resume_anybody(self) -> None:
        """Nothing runs, and who way was made for could not start either."""
        self._way_for = None
        self.resume(())

    def _has_way_back(self, task: Task, taken: int) -> bool:
        if not self.running:
            return True
        has_place = len(self.running) < self._max_running and self._pool.has_sequence_to_give
        return has_place and self._needed_back(task, len(self.running)) + taken <= self._pool.unlocked_cells

    def _make_way_back(self, task: Task, unread: list[Task], taken: int) -> bool:
        """Swap out some of these, whose readers are behind, so that a task can come back; False when that does not help."""
        n_left = len(self.running) - len(unread)
        cells = self._pool.unlocked_cells + sum(other.computed for other in unread)
        if not unread or (n_left and self._needed_back(task, n_left) + taken > cells):
            return False
        for other in unread:
            self.swap_out(other)
            if self._admission.within_limit(task) and self._has_way_back(task, taken):
                return True
        return False

    def _needed_back(self, task: Task, n_running: int) -> int:
        return self._admission.cells_needed(task, reply_tokens=0) + HEADROOM_CELLS * (n_running + 1)

    def may_start(self, newcomers: list[Task]) -> list[Task]:
        """Of those who wait, who may start although others wait to come back. Whose reader is behind does not wait."""
        if not self.swapped or not newcomers:
            return newcomers
        counts, others = self._counts(), [other for other in self.swapped.values() if not other.paused]
        return [task for task in newcomers if all(self._goes_before(task, other, counts) for other in others)]

    # Out

    def swap_out(self, task: Task) -> None:
        sequence = task.sequence
        assert sequence is not None
        self._admission.promises.remove(task)
        del self.running[task.request.request_id]
        if sequence.length == 0:
            self._pool.drop(sequence)
            task.sequence = None
            self._admission.waiting.push(task)
            return
        self._resting.park(task)
        task.n_swaps += 1
        if task.timeline is not None:
            task.timeline.left(self._clock())
        self.short_of_cells = True
        self.swapped[task.request.request_id] = task
        self._accounts.swaps += 1

    def swap_out_unread(self, planned: Collection[Task]) -> bool:
        """Let a request whose reader is behind make way for one that waits; False when there is none."""
        unread = next((task for task in self.running.values() if task.paused and task not in planned), None)
        if unread is not None:
            self.swap_out(unread)
        return unread is not None

    def last(self, namespace: Namespace | None = None) -> Task:
        """Who gives way, of one namespace or of all."""
        return max(self.of(namespace), key=lambda task: (task.paused, -task.request.priority, task.submitted_at))

    def of(self, namespace: Namespace | None) -> list[Task]:
        """Running tasks of one namespace, or all."""
        return [task for task in self.running.values() if namespace in (None, task.request.namespace)]

    def make_way(self) -> None:
        """Before a step: whoever goes before somebody that runs, and found no place, gets one."""
        full = len(self.running) >= self._max_running or not self._pool.has_sequence_to_give
        turned_away, self.turned_away = self.turned_away, False
        if not (turned_away or full) or not self._could_be_fairer():
            return
        task = self._admission.first_in_line()
        if task is None or len(task.tokens) >= self._pool.shape.cells_per_sequence:
            return
        counts = self._counts()
        lesser = [other for other in self.running.values() if self._goes_before(task, other, counts)]
        if self._needed(task) > self._pool.unlocked_cells + sum(other.computed for other in lesser):
            return
        while not self._has_place(task):
            lesser = [other for other in lesser if other.sequence is not None and self._goes_before(task, other, counts)]
            if not lesser:
                return
            victim = max(lesser, key=lambda other: (-other.request.priority, self._load(other, counts), other.submitted_at))
            counts[victim.request.tenant] -= 1
            self._way_for = task
            self.swap_out(victim)

    def _has_place(self, task: Task) -> bool:
        if len(self.running) >= self._max_running or not self._pool.has_sequence_to_give:
            return False
        return self._needed(task) <= self._pool.unlocked_cells

    def _needed(self, task: Task) -> int:
        return self._admission.cells_needed(task) + HEADROOM_CELLS * len(self.running)

    # Who goes before whom

    def _could_be_fairer(self) -> bool:
        """Whether anybody who waits might go before anybody who runs: a look at numbers alone."""
        waiting, running = self._admission.waiting, self.running.values()
        if not len(waiting) or not running:
            return False
        if waiting.highest_priority > min(task.request.priority for task in running):
            return True
        counts = self._counts()
        most = max((counts[task.request.tenant] - 1) / task.request.allowance.weight for task in running)
        return any(MUCH_MORE * (counts[tenant] + 1) / weight <= most for tenant, weight in waiting.weights())

    def _counts(self) -> Counter[str]:
        """Places that each tenant has."""
        return Counter(task.request.tenant for task in self.running.values())

    def _goes_before(self, task: Task, other: Task, counts: Counter[str]) -> bool:
        """Whether `other`, running or swapped out, makes way for a waiting task."""
        now, urgency = self._clock(), self._admission.urgency
        difference = urgency(task, now) - urgency(other, now)
        if difference:
            return difference > 0
        mine, theirs = task.request, other.request
        left = (counts[theirs.tenant] - (other.sequence is not None)) / theirs.allowance.weight
        return mine.tenant != theirs.tenant and left >= MUCH_MORE * (counts[mine.tenant] + 1) / mine.allowance.weight

    @staticmethod
    def _load(task: Task, counts: Counter[str]) -> float:
        return counts[task.request.tenant] / task.request.allowance.weight
