"""The way between the live cache and the store: what is saved when, and what a request gets back.

    idle sequence evicted      what the store lacks of it is saved first, so eviction loses nothing that pays to keep
    idle sequence resting      demoted after a while: idle cells cost every step of everyone else
    idle for very long         forgotten, and not saved: what the tiers have of it goes by the same time
    request swapped out        saved and pinned; it comes back through the same door as a new request
    request starting           live cells first, then what the store has in RAM, the rest is computed
    declared to be public      restored from the public namespace into cells of its own: what follows is nobody else's
    request waiting            slow tiers are asked for what follows, and lift it into RAM

The store's null form is one with a budget of nothing: it still holds what was swapped out. With sharing off, a request can only
find what it saved itself. Engine thread; owns no KV.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from pasture.core.asked import Asked
from pasture.core.ports import Clock
from pasture.core.storage import SlabCodec, Store
from pasture.core.values import PUBLIC_NAMESPACE, Namespace, Request, Slab
from pasture.kv.pool import Pool
from pasture.kv.radix import common_prefix
from pasture.kv.sequence import Sequence
from pasture.scheduler.samples import Samples
from pasture.scheduler.settings import SchedulerSettings
from pasture.scheduler.task import Task

MIN_RESTORE_TOKENS = 16
"""fewer are computed along with the rest of the prompt"""
REMEMBERED_SAVES = 64
"""the latest, with which a waiting request compares its tokens"""


@dataclass(frozen=True, slots=True)
class _Saving:
    """What a Save that is under way will hold."""

    namespace: Namespace
    tokens: array[int]
    task: Task | None
    """who was swapped out with it"""


class Resting:
    def __init__(
        self,
        pool: Pool,
        store: Store,
        codec: SlabCodec,
        clock: Clock,
        settings: SchedulerSettings,
        wake: Callable[[], None],
    ) -> None:
        """`wake` is called from other threads when a lift is done."""
        self.store = store
        self.samples = Samples(pool, codec)
        self._pool = pool
        self._clock = clock
        self._idle_live_seconds = settings.idle_live_seconds
        self._none_rested_before = 0.0
        """when something may have rested long enough, so that not every step asks all that is idle"""
        self._expire_seconds = settings.expire_seconds
        self._own_seconds: Mapping[Namespace, float] = {}
        """of namespaces whose KV is kept for another time"""
        self._wake = wake
        self._saving: dict[int, _Saving] = {}
        self._recent: dict[int, _Saving] = {}
        """the latest of them, those that are done too"""
        self._copied: dict[Sequence, int] = {}
        """length at which an idle sequence was copied out last; its id says nothing, because the next to come gets it again"""
        self._asked = Asked()
        """of models whose state cannot be cut: the first may have left the live cache when the second parts from it"""
        pool.before_eviction = self._before_eviction

    # Out of the live cache

    def save(self, sequence: Sequence) -> bool:
        """Have the next operations save what the store lacks of a sequence; False when it lacks nothing worth keeping."""
        if not self._pool.shares or not sequence.length or not self.store.worth_saving(sequence.length):
            return False
        tokens = sequence.tokens()
        p0 = self.store.gap(sequence.namespace, tokens, 0)
        if p0 >= len(tokens):
            return False
        key = self._pool.save(sequence, p0)
        self._saving[key] = self._recent[key] = _Saving(sequence.namespace, tokens, None)
        if len(self._recent) > REMEMBERED_SAVES:
            del self._recent[next(iter(self._recent))]
        return True

    def _before_eviction(self, sequence: Sequence) -> None:
        """Save what is about to leave; if only the end of it does, other tokens may follow, to the same length."""
        self._copied.pop(sequence, None)
        self.samples.forget(sequence)
        self.save(sequence)

    def park(self, task: Task) -> None:
        """Save and pin a running request's KV, and take its sequence from it."""
        sequence = task.sequence
        assert sequence is not None
        namespace, tokens = self._namespace(task.request), task.tokens[: sequence.length]
        task.pin = self.store.pin(namespace, tokens)
        p0 = self.store.gap(namespace, tokens, 0)
        if p0 < len(tokens):
            self._saving[self._pool.save(sequence, p0)] = _Saving(namespace, tokens, task)
            task.n_saves += 1
        self._pool.drop(sequence)
        task.sequence = None

    def saved(self, slabs: Mapping[int, Slab]) -> None:
        """What the engine has saved goes into the store, or is compared with what came out of it."""
        self.samples.saved(slabs)
        for key, slab in slabs.items():
            saving = self._saving.pop(key, None)
            if saving is None:
                continue
            task = saving.task
            if task is None or task.pin is None:  # nobody's, or its request has ended meanwhile
                self.store.put(saving.namespace, saving.tokens, slab)
                continue
            before, task.pin = task.pin, self.store.hold(saving.namespace, saving.tokens, slab)
            before.release()
            task.n_saves -= 1

    def demote(self) -> bool:
        """Have the longest idle sequence leave the live cache, if it has rested long enough; False when none has."""
        if self._idle_live_seconds is None or not self._pool.shares:
            return False
        now = self._clock()
        if now < self._none_rested_before:
            return False
        oldest = self._oldest()
        rests_since = now if oldest is None else oldest.tail.last_used
        if oldest is None or now - rests_since < self._idle_live_seconds:
            self._none_rested_before = rests_since + self._idle_live_seconds
            return False
        self._pool.drop(oldest, "idle")
        return True

    def expire(self) -> None:
        """Forget what nobody has used for too long. It is not saved: that would make it young again."""
        while self.expires_in() == 0:
            due = min(self._idle(), key=self._expires_at)
            self._copied.pop(due, None)
            self._pool.drop(due, "expired", unsaved=True)

    def expires_in(self) -> float | None:
        """Seconds until something idle has been unused for too long; None when nothing can come to that."""
        if self._expire_seconds is None:
            return None
        first = min(map(self._expires_at, self._idle()), default=None)
        return None if first is None else max(0.0, first - self._clock())

    def keep_for(self, seconds: Mapping[Namespace, float]) -> None:
        """How long these namespaces' may rest unused before it is forgotten; others' as long as the settings say."""
        self._own_seconds = seconds

    def _expires_at(self, sequence: Sequence) -> float:
        assert self._expire_seconds is not None
        return sequence.tail.last_used + self._own_seconds.get(sequence.namespace, self._expire_seconds)

    def _oldest(self) -> Sequence | None:
        return min(self._idle(), key=lambda sequence: sequence.tail.last_used, default=None)

    def _idle(self) -> Iterator[Sequence]:
        return (sequence for sequence in self._pool.sequences.values() if sequence.idle)

    def start_over(self) -> None:
        """The live cache was emptied: what was to be saved of it never will be."""
        self._saving.clear()
        self._recent.clear()
        self._copied.clear()
        self.samples.clear()

    def keep_everything(self) -> None:
        """Save whatever is live, before the end: for a store that outlives the process."""
        for sequence in self._pool.sequences.values():
            self.save(sequence)

    def copy_idle(self) -> bool:
        """Save one idle sequence that the store does not have, without letting it go; False when all are stored."""
        live = self._pool.sequences
        self._copied = {sequence: length for sequence, length in self._copied.items() if live.get(sequence.id) is sequence}
        for sequence in live.values():
            if sequence.idle and self._copied.get(sequence) != sequence.length:
                self._copied[sequence] = sequence.length  # once, even where the store cannot keep it
                if self.save(sequence):
                    return True
        return False

    # Back into it

    def look(self, task: Task) -> bool:
        """Find out what the store has for a waiting request; False while slow tiers are still being asked.

        False too, for one step, while more of its tokens than it could find now are leaving the live cache for the store.
        """
        if not self._may_find(task):
            return True
        namespace, tokens = self._namespace(task.request), task.tokens[:-1]
        saved = self._saved_since(task, namespace, tokens)
        if saved is not None:
            if saved in self._saving and task.waits_for in (None, saved) and self._gains(task, namespace, tokens, saved):
                task.waits_for = saved
                return False
            task.looked = task.lift is not None  # what was live then is stored now
        task.seen_save = next(reversed(self._recent), 0)
        if not task.looked:
            task.looked = True
            task.stored_tokens = max(self.store.reach(namespace, tokens), self._public_reach(task))
            have = max(task.stored_tokens, self._pool.lookup(task.request.namespace, task.tokens))
            if len(tokens) - have >= MIN_RESTORE_TOKENS:
                task.lift = self.store.lift(namespace, tokens, have, self._wake)
        if task.lift is None:
            return True
        if not task.lift.done:
            return False
        task.stored_tokens = max(task.stored_tokens, self.store.reach(namespace, tokens))
        return True

    def _saved_since(self, task: Task, namespace: Namespace, tokens: array[int]) -> int | None:
        """Of the saves begun since a prompt was looked for, the one that has most of its beginning; None: nothing."""
        best, longest = None, MIN_RESTORE_TOKENS - 1
        for key in reversed(self._recent):
            if key <= task.seen_save:
                break
            recent = self._recent[key]
            if recent.namespace == namespace and (common := common_prefix(recent.tokens, 0, tokens, 0)) > longest:
                best, longest = key, common
        return best

    def _gains(self, task: Task, namespace: Namespace, tokens: array[int], key: int) -> bool:
        """Whether a save under way has more of a prompt than live cells or RAM have now."""
        leaving = self._recent[key].tokens
        common = common_prefix(leaving, 0, tokens, 0)
        if not self._pool.cuttable and common < len(leaving):
            return False
        live = self._pool.lookup(task.request.namespace, task.tokens)
        return common - max(live, task.stored_tokens, self.store.reach(namespace, tokens)) >= MIN_RESTORE_TOKENS

    def enter(self, task: Task) -> Sequence | None:
        """Give a request a sequence with all that is live or in RAM of its tokens; None when every sequence id runs."""
        request, pool = task.request, self._pool
        namespace, tokens = self._namespace(request), task.tokens[:-1]
        reach = self.store.reach(namespace, tokens) if self._may_find(task) else 0
        public = self._public_reach(task)
        source = namespace
        if public > reach:
            source, reach = PUBLIC_NAMESPACE, public
        live = pool.lookup(request.namespace, task.tokens)
        restores = reach - live >= MIN_RESTORE_TOKENS
        if restores and not pool.cuttable:
            sequence = pool.begin(request.namespace, request.request_id)
        else:
            sequence = pool.join(request.namespace, task.tokens, request.request_id)
        if sequence is None:
            return None
        if pool.shares and not task.n_swaps and request.max_tokens:  # who wants no reply comes before somebody who does
            self.store.arrived(namespace, tokens)
        before = sequence.length
        if restores:
            self._put_back(sequence, source, tokens[:reach])
        if task.timeline is not None:
            task.timeline.restores(sequence.length - before)
        self.forget(task)
        return sequence

    def ended(self, task: Task) -> None:
        """A request ends, and still has its sequence: what may follow is guessed from what was said so far."""
        if self._pool.shares and task.request.max_tokens and task.computed:
            self.store.finished(task.request.namespace, task.tokens[: task.computed], task.request.expects)

    def restore(self, sequence: Sequence, tokens: array[int]) -> None:
        """Put behind a running sequence what RAM has of `tokens`, which it is the beginning of."""
        reach = self.store.reach(sequence.namespace, tokens)
        if reach - sequence.length >= MIN_RESTORE_TOKENS:
            self._put_back(sequence, sequence.namespace, tokens[:reach])

    def _put_back(self, sequence: Sequence, source: Namespace, tokens: array[int]) -> None:
        slabs = self.store.take(source, tokens, sequence.length, len(tokens))
        if slabs and self._pool.restore(sequence, tokens[sequence.length :], slabs):
            self.samples.restored(sequence, slabs)

    @staticmethod
    def forget(task: Task) -> None:
        """Let go of what the store holds for a request that has its sequence, or has ended."""
        if task.pin is not None:
            task.pin.release()
        if task.lift is not None:
            task.lift.release()
        task.pin, task.lift, task.n_saves = None, None, 0

    def branch_point(self, task: Task) -> int | None:
        """Where a state that cannot be cut should be kept, because two prompts part behind it; None: nowhere ahead."""
        if self._pool.cuttable or not self._pool.shares:
            return None
        position = self._asked.note(task.request.namespace, task.tokens[:-1])
        return position if position > task.computed else None

    def _public_reach(self, task: Task) -> int:
        """How much of a prompt's declared beginning the store has for everybody."""
        n_tokens = min(task.request.public_tokens, len(task.tokens) - 1)
        if not n_tokens or not self._pool.shares or not self._pool.cuttable:
            return 0
        return self.store.reach(PUBLIC_NAMESPACE, task.tokens[:n_tokens])

    def _may_find(self, task: Task) -> bool:
        return self._pool.shares or task.n_swaps > 0

    def _namespace(self, request: Request) -> Namespace:
        """Where its blocks are filed: with sharing off, in a namespace of its own."""
        return request.namespace if self._pool.shares else Namespace(f"{request.namespace}\0{request.request_id}")
