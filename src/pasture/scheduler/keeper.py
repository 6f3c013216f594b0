"""Keeps the live cache in the layout and the form that suit the traffic, and compact: the scheduler's hand on `Engine.rebuild`.

Watches who runs and waits, asks the advisor (layout) and the shifter (form of the cells), and rebuilds the pool by save and
restore. Engine thread, between two steps.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from itertools import islice

from pasture.core.errors import DoesNotFit
from pasture.core.ports import Clock, Engine
from pasture.core.values import Form, Layout, StepPlan, StepResult
from pasture.kv.radix import RadixTree
from pasture.scheduler.layout import LayoutAdvisor, Target, Traffic
from pasture.scheduler.scheduler import Scheduler
from pasture.scheduler.settings import LayoutChoice
from pasture.scheduler.shift import Demand, Shifter
from pasture.scheduler.task import Task

log = logging.getLogger(__name__)

LOOK_STEPS = 8
"""steps between two looks at unchanged traffic"""
MAX_LOOKED_AT = 64
"""requests whose tokens one look counts; the longest is sought among all"""
REPLY_TOKENS = 64
"""of a reply that is expected when cells are estimated"""
LONG_REPLY_TOKENS = 512
"""of a reply that a stream must leave room for"""
LATELY_SECONDS = 60.0
"""an idle sequence used since then is taken along into streams, or there is no move"""
FRAGMENTED = 0.15
"""share of broken neighbourhoods, or of cells left behind, from which a compaction pays"""
MIN_COMPACT_CELLS = 512
STAY_SECONDS = 30.0
"""in a layout after one that was to follow it did not fit, and as scattered after a compaction for which there was no memory"""
TURNOVER = 0.5
"""of all cells, given back since the last compaction: from then on one pays although somebody waits for it"""
SECONDS_PER_CELL = 50e-6
"""of a compaction, before some were measured"""


class LayoutKeeper:
    def __init__(self, engine: Engine, scheduler: Scheduler, clock: Clock) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._clock = clock
        self._advisor = LayoutAdvisor(engine.shape)
        settings = scheduler.settings
        self._stay_until = self._scattered_until = float("-inf")
        self._moves = settings.layout is LayoutChoice.AUTO and scheduler.pool.joins and engine.shape.layout is Layout.UNIFIED
        self._until_shift = LOOK_STEPS
        self._raw_cells = engine.shape.n_cells
        self._shifts = settings.shift_to is not None and scheduler.pool.joins  # else a rebuild would share what is not
        self._shifter = Shifter(settings.shift_to if self._shifts else None, engine.shape.n_cells)
        self._traffic: Traffic | None = None
        self._looked_at = -1
        self._steps_since = 0
        self._seconds_per_cell = deque([SECONDS_PER_CELL], maxlen=4)
        """of the last compactions: the shortest counts, since any may have been held up by something else"""

    def observe(self, plan: StepPlan, result: StepResult) -> None:
        """Learn from a step that has just run."""
        if plan.works:
            self._shifter.observe(self._clock(), result.decode_seconds, plan.n_tokens)
        if self._moves and self._traffic is not None and plan.works and result.decode_seconds > 0:
            self._advisor.observe(self._scheduler.pool.shape.layout, self._traffic, plan.n_tokens, result.decode_seconds)

    def target(self) -> Target | None:
        """Where the pool should move before the next step; None to stay."""
        submitted = self._scheduler.accounts.submitted
        self._steps_since += 1  # those without works too: who is swapped out may wait for another layout
        if not self._moves or (submitted == self._looked_at and self._steps_since < LOOK_STEPS):
            return None
        if self._clock() < self._stay_until:
            return None
        self._looked_at, self._steps_since = submitted, 0
        self._traffic = self._look()
        return self._advisor.advise(self._scheduler.pool.shape, self._traffic) if self._traffic is not None else None

    def move(self, target: Target) -> None:
        """Lay the pool out anew; the journal must be empty.

        Stays where it is for a while when that turns out not to fit. Who needed it, too long for the layout that stays, is
        ended with an error.
        """
        pool, before = self._scheduler.pool, self._scheduler.pool.shape
        try:
            pool.rebuilt(self._engine.rebuild(pool.segments(), target.layout, target.n_seqs))
        except DoesNotFit as error:
            log.warning("the cache stays in the %s layout: %s", before.layout, error)
            self._stay_until = self._clock() + STAY_SECONDS
            self._scheduler.end_too_long()
            return
        self._scheduler.accounts.layout_moves += 1
        self._advisor.moved()
        log.info("layout: %s with %d sequences -> %s with %d", before.layout, before.n_seqs, target.layout, target.n_seqs)

    def shift(self) -> Form | None:
        """The form that the cells should be rewritten in before the next step; None to stay."""
        scheduler = self._scheduler
        self._until_shift -= 1
        if not self._shifts or self._until_shift > 0:
            return None
        self._until_shift = LOOK_STEPS
        demand = Demand(scheduler.places.short_of_cells, self._needed_cells())
        scheduler.places.short_of_cells = False
        return self._shifter.advise(scheduler.pool.shape.form, demand, self._clock())

    def rewrite(self, form: Form) -> None:
        """Rebuild the pool with cells in this form, as many as the same bytes hold; the journal must be empty."""
        pool, before = self._scheduler.pool, self._scheduler.pool.shape
        try:
            pool.rebuilt(self._engine.rebuild(pool.segments(), before.layout, before.n_seqs, form))
        except DoesNotFit as error:
            log.warning("the cells stay %s: %s", before.form, error)
            self._shifter.refuse(self._clock())
            return
        self._scheduler.resting.samples.clear()
        self._shifter.shifted(form, self._clock())
        self._scheduler.accounts.shifts += 1
        log.info("cells: %d %s -> %d %s", before.n_cells, before.form, pool.shape.n_cells, form)

    def make_fit(self, form: Form) -> bool:
        """Drop idle sequences until the pool fits into cells of this form; False when what runs is too much."""
        pool = self._scheduler.pool
        n_cells = self._raw_cells if form is Form.RAW else pool.shape.n_cells
        if pool.shape.layout is Layout.STREAMS:
            return pool.make_movable(Layout.STREAMS, pool.shape.n_seqs, n_cells // pool.shape.n_seqs // 256 * 256)
        return pool.make_room(pool.shape.n_cells - n_cells)

    def _needed_cells(self) -> int:
        """Of everything that runs, waits or is swapped out, common prefixes counted once; at most MAX_LOOKED_AT of them."""
        scheduler = self._scheduler
        tasks = islice((*scheduler.running.values(), *scheduler.swapped.values(), *scheduler.waiting), MAX_LOOKED_AT)
        return _distinct(tasks)

    def make_movable(self, target: Target) -> bool:
        """Drop old idle sequences that cannot come along; False when something running could not."""
        n_cells = self._engine.shape.n_cells
        longest = n_cells if target.layout is Layout.UNIFIED else n_cells // target.n_seqs // 256 * 256
        return self._scheduler.pool.make_movable(target.layout, target.n_seqs, longest)

    @property
    def wants_compaction(self) -> bool:
        pool = self._scheduler.pool
        return (
            self._scheduler.settings.compact
            and pool.cells_are_shared
            and pool.used_cells >= MIN_COMPACT_CELLS
            and max(pool.fragmentation, pool.placement.left_cells / pool.used_cells) > FRAGMENTED
            and self._clock() >= self._scattered_until
        )

    @property
    def wants_compaction_at_once(self) -> bool:
        """Whether it pays beside requests: prompts have filled holes, and streams stand still no longer than for a step."""
        pool, settings = self._scheduler.pool, self._scheduler.settings
        return (
            settings.compact
            and pool.cells_are_shared
            and pool.shape.can_pad  # there are tiles
            and pool.placement.freed_cells > TURNOVER * pool.shape.n_cells
            and pool.used_cells * min(self._seconds_per_cell) < settings.itl_target_seconds
            and self._clock() >= self._scattered_until
        )

    def compact(self) -> None:
        """Put neighbours next to each other again, where there is memory for it; the journal must be empty."""
        pool, started = self._scheduler.pool, self._clock()
        try:
            pool.rebuilt(self._engine.rebuild(pool.segments(), pool.shape.layout, pool.shape.n_seqs))
        except DoesNotFit as error:
            log.warning("the cache is not compacted: %s", error)
            self._scattered_until = started + STAY_SECONDS
            return
        self._seconds_per_cell.append((self._clock() - started) / max(1, pool.used_cells))

    def _look(self) -> Traffic | None:
        scheduler = self._scheduler
        swapped, running = scheduler.swapped.values(), scheduler.running.values()
        everybody = (*swapped, *running, *scheduler.waiting)
        tasks = everybody[:MAX_LOOKED_AT]
        if not tasks:
            return None
        now, pool = self._clock(), scheduler.pool
        ids = [s.id for s in pool.sequences.values() if not s.idle or now - s.tail.last_used < LATELY_SECONDS]
        replies = sum(min(task.tokens_to_draw, REPLY_TOKENS) // 2 for task in tasks)
        return Traffic(
            rows=len(tasks),
            attended_cells=sum(len(task.tokens) for task in tasks) + replies,
            distinct_cells=_distinct(tasks) + replies,
            idle_cells=max(0, pool.used_cells - pool.locked_cells),
            longest_tokens=max(len(task.tokens) + min(task.tokens_to_draw, LONG_REPLY_TOKENS) for task in everybody),
            n_ids=max(ids, default=-1) + 1,
        )


def _distinct(tasks: Iterable[Task]) -> int:
    """Tokens of all these conversations, common prefixes counted once."""
    tree: RadixTree[Task] = RadixTree()
    for task in tasks:
        tree.insert(task.request.namespace, task.tokens, task)
    return tree.n_tokens
