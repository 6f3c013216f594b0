"""Prefill ahead of time: prompts that will probably be asked for, brought back and computed while nobody asks for anything.

    anticipate()  ->  a short list, newest first; what slow tiers have of what is typed begins to rise into RAM at once
    next()        ->  a step of its own: the first prompt that is not rising any more, restored and one piece further computed
    give_way()    ->  somebody asks: what is computed so far stays, idle

A wrong guess costs nothing that anybody sees: a step is one tile at most, it never runs beside a request, whoever comes
interrupts it where the backend can stop, and what it leaves behind is an idle sequence like any other, the first to go when
room is needed. A prompt that goes on from one on the list takes its place: so grows the draft of somebody who types. Owns at
most one running sequence. Engine thread.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from pasture.core.ports import Clock
from pasture.core.storage import Lift
from pasture.core.values import Namespace, Outcome, RequestId, StepPlan, StepResult, Work
from pasture.kv.pool import Pool
from pasture.kv.sequence import Sequence
from pasture.scheduler.resting import MIN_RESTORE_TOKENS, Resting

MAX_ANTICIPATED = 64
"""prompts on the list; beyond that the oldest of whoever has most is forgotten"""
MAX_TYPING_SECONDS = 60.0
"""after which what was typed is not expected any more: its blocks are held in RAM until then"""
MAX_LIFTED = 16
"""prompts whose blocks are on their way into RAM, or held there for them; no more of them than the live cache has room for"""
MIN_TILE_TOKENS = 64
"""of one step where the engine has no tiles"""
PIECE_TOKENS = 16
"""of one step when less than a tile is missing: its rows cost each the same, and somebody may come"""
MIN_MISSING_TOKENS = 8
"""fewer are computed along with the next prompt"""
MIN_TYPED_TOKENS = 1
"""the same where somebody is typing that prompt, and will wait for every one of them"""
_NOBODY = RequestId("ahead")


@dataclass(slots=True, eq=False)
class _Prompt:
    namespace: Namespace
    tokens: array[int]
    since: float
    typing: bool
    looked: bool = False
    """whether slow tiers have been asked for it"""
    lift: Lift | None = None
    """of its blocks, into RAM"""

    def goes_on_from(self, other: _Prompt) -> bool:
        n_tokens = len(other.tokens)
        return (
            self.namespace == other.namespace
            and n_tokens <= len(self.tokens)
            and memoryview(self.tokens)[:n_tokens] == memoryview(other.tokens)
        )


class Ahead:
    def __init__(self, pool: Pool, resting: Resting, clock: Clock, wake: Callable[[], None]) -> None:
        """`wake` is called from other threads when a prompt has risen."""
        self._pool = pool
        self._resting = resting
        self._clock = clock
        self._wake = wake
        self._prompts: list[_Prompt] = []
        """oldest first"""
        self._current: tuple[_Prompt, Sequence] | None = None
        """who is being computed"""
        self.computed_tokens = 0

    @property
    def waiting(self) -> bool:
        return bool(self._prompts)

    def anticipate(self, namespace: Namespace, tokens: array[int], *, typing: bool = False) -> None:
        """Compute these tokens when there is time; they should be the beginning of somebody's next prompt.

        `typing`: that somebody is writing it already, so it is sure to come, and soon.
        """
        missing = len(tokens) - self._pool.lookup(namespace, tokens)
        least = MIN_TYPED_TOKENS if typing else MIN_MISSING_TOKENS
        if not self._pool.shares or missing < least or len(tokens) >= self._pool.shape.cells_per_sequence:
            return
        self.give_way()
        prompt = _Prompt(namespace, tokens, self._clock(), typing)
        before = next((other for other in self._prompts if prompt.goes_on_from(other)), None)
        if before is not None:
            prompt.looked, prompt.lift, before.lift = before.looked, before.lift, None
            self._forget(before)
        if typing:
            self._look(prompt)
        self._prompts.append(prompt)
        if len(self._prompts) > MAX_ANTICIPATED:
            most = Counter(other.namespace for other in self._prompts).most_common(1)[0][0]
            self._forget(next(other for other in self._prompts if other.namespace == most))

    def came(self, namespace: Namespace, tokens: array[int]) -> None:
        """A request with these tokens has its sequence: what was expected of it has come, and needs no more keeping."""
        came = _Prompt(namespace, tokens, self._clock(), typing=False)
        for prompt in [prompt for prompt in self._prompts if came.goes_on_from(prompt)]:
            self._forget(prompt)

    def expire(self) -> None:
        """What was typed a while ago is not expected any more, however busy the server is."""
        oldest = self._clock() - MAX_TYPING_SECONDS
        for prompt in [prompt for prompt in self._prompts if prompt.typing and prompt.since < oldest]:
            if self._current is not None and self._current[0] is prompt:
                self.give_way()
            self._forget(prompt)

    def next(self) -> StepPlan | None:
        """A step for the newest prompt that can be computed; None when there is none."""
        while (current := self._current or self._begin()) is not None:
            prompt, sequence = current
            n = self._piece(len(prompt.tokens) - sequence.length)
            within_limit = self._pool.evictor.keep_within(prompt.namespace, n)
            if not n or not within_limit or not self._pool.make_room(n):
                self._leave(prompt)
                continue
            start = sequence.length
            work = Work(sequence.id, prompt.tokens[start : start + n], start, None)
            return StepPlan(self._pool.operations(), (work,))
        return None

    def book(self, plan: StepPlan, result: StepResult) -> None:
        """The step of `next` has run."""
        (work,) = plan.works
        assert self._current is not None
        prompt, sequence = self._current
        if result.outcome is Outcome.DONE:
            self._pool.extend(sequence, array("i", work.tokens))
            self.computed_tokens += len(work.tokens)
        elif sequence.id in result.lost:
            self._pool.lose(sequence)
            self._current = None
            self._forget(prompt)
        elif result.outcome is Outcome.INTERRUPTED:
            self.give_way()
        else:
            self._leave(prompt)

    def give_way(self) -> None:
        """Somebody asks for something: what is computed stays as an idle sequence, the rest may be computed later."""
        if self._current is not None:
            self._pool.finish(self._current[1])
            self._current = None

    def forget(self) -> None:
        """The live cache was emptied."""
        self._current = None
        for prompt in list(self._prompts):
            self._forget(prompt)

    def _begin(self) -> tuple[_Prompt, Sequence] | None:
        """Start with the newest prompt that is not rising any more."""
        for prompt in self._prompts[::-1]:
            if len(prompt.tokens) >= self._pool.shape.cells_per_sequence:  # in streams, since it was put on the list
                self._forget(prompt)
                continue
            if not self._look(prompt) or (prompt.lift is not None and not prompt.lift.done):
                continue
            sequence = self._pool.join(prompt.namespace, prompt.tokens, _NOBODY)
            if sequence is None:
                return None
            if self._pool.cuttable:
                self._resting.restore(sequence, prompt.tokens[:-1])
            self._current = prompt, sequence
            return self._current
        return None

    def _look(self, prompt: _Prompt) -> bool:
        """Have what slow tiers have of a prompt rise into RAM, once; False while too many others are held there."""
        if not prompt.looked and self._may_lift(prompt):
            prompt.looked = True
            have = max(self._pool.lookup(prompt.namespace, prompt.tokens), self._reach(prompt))
            if len(prompt.tokens) - have >= MIN_RESTORE_TOKENS:
                prompt.lift = self._resting.store.lift(prompt.namespace, prompt.tokens, have, self._wake)
        return prompt.looked

    def _may_lift(self, prompt: _Prompt) -> bool:
        """Whether there is a place for it; who has clearly more of them than others gives up its oldest for theirs."""
        lifted = [other for other in self._prompts if other.lift is not None]
        n_tokens = sum(len(other.tokens) for other in lifted) + len(prompt.tokens)
        if len(lifted) < MAX_LIFTED and n_tokens <= self._pool.shape.n_cells:
            return True
        counts = Counter(other.namespace for other in lifted)
        if not counts:
            return False
        most, n_most = counts.most_common(1)[0]
        if n_most <= counts[prompt.namespace] + 1:
            return False
        self._let_go(next(other for other in lifted if other.namespace == most))
        return self._may_lift(prompt)

    def _reach(self, prompt: _Prompt) -> int:
        return self._resting.store.reach(prompt.namespace, prompt.tokens)

    def _piece(self, missing: int) -> int:
        """How many of the missing tokens the next step computes."""
        shape = self._pool.shape
        tile = min(max(MIN_TILE_TOKENS, shape.tile_tokens), shape.n_batch)
        return tile if missing >= tile else min(missing, PIECE_TOKENS, shape.n_batch)

    def _leave(self, prompt: _Prompt) -> None:
        """Done with a prompt, one way or another."""
        self.give_way()
        self._forget(prompt)

    def _forget(self, prompt: _Prompt) -> None:
        self._prompts.remove(prompt)
        self._let_go(prompt)

    @staticmethod
    def _let_go(prompt: _Prompt) -> None:
        if prompt.lift is not None:
            prompt.lift.release()
            prompt.lift = None
