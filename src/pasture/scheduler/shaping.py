"""Puts a step together: how much prompt goes beside the streams, in one batch, two, or the annex, filled up or not.

Translates works into the loads that `StepCosts` knows about, asks it, and tells it afterwards what the step really took. The
streams' works always come first. Owns nothing but the costs; reads the pool. Engine thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from pasture.core.values import Layout, PoolShape, StepPlan, StepResult, Work
from pasture.kv.pool import Pool
from pasture.scheduler.costs import APART_GAIN, AnnexLoad, Load, StepCosts
from pasture.scheduler.task import Task


class StepShaper:
    def __init__(self, pool: Pool, itl_target_seconds: float) -> None:
        self.costs = StepCosts(itl_target_seconds)
        self._pool = pool

    def prompt_share(self, streams: Sequence[Work], prompt: Task, n_waiting: int, *, brief: bool = False) -> int:
        """How many prompt tokens to put beside the streams, if `prompt` goes next; it has its sequence.

        `n_waiting` of the streams' tenant wait for a first token: a reason to compute more of one long prompt at a time, but
        none to compute several short ones together, whose first tokens would all come later. `brief`: somebody who comes now
        would go before this prompt, and should find a short step.
        """
        assert prompt.sequence is not None
        pool = self._pool
        sequences = [pool.sequences[work.sequence] for work in streams]
        own = prompt.sequence.length
        joined = pool.distinct_cells([*sequences, prompt.sequence]) if pool.cells_are_shared else own
        load = Load(0, 1, own, joined, own, pool.used_cells)
        beside = self._load(streams, len(streams))
        share = self.costs.step(pool.shape, beside, load, brief=brief)
        if prompt.remaining <= share or not n_waiting:
            return share
        return max(share, min(prompt.remaining, self.costs.step(pool.shape, beside, load, n_waiting)))

    def plan(self, works: list[Work], n_streams: int) -> StepPlan:
        """The step of these works, the first `n_streams` of them streams. Makes the room it needs for filling up."""
        pool = self._pool
        works = self._placed(works, n_streams)
        inside = _in_pool(works)
        n_apart = n_streams if self._are_better_apart(inside, n_streams) else 0
        pad_to = 0
        if pool.shape.can_pad and len(inside) > n_apart:
            pad_to = self.costs.padding(pool.shape, self._load(inside[n_apart:], n_streams - n_apart))
        plan = StepPlan((), tuple(works), n_apart, pad_to)
        if pad_to and not pool.make_room(plan.n_cells):
            plan = replace(plan, pad_to=0)
        return replace(plan, operations=pool.operations())

    def padded(self, work: Work) -> Work:
        """A prompt's short chunk in the streams layout, filled up where that is cheaper."""
        n_pads = self.costs.chunk_padding(self._pool.shape, len(work.tokens), work.start)
        return replace(work, pad_tokens=n_pads) if n_pads else work

    def learn(self, plan: StepPlan, n_streams: int, result: StepResult) -> None:
        """What the plan, whose first `n_streams` works were streams, took. Before the pool books the step's tokens."""
        if not plan.works or result.decode_seconds <= 0:
            return
        shape, seconds = self._pool.shape, result.decode_seconds
        if annexed := [AnnexLoad(len(work.tokens), work.start) for work in plan.works if work.in_annex]:
            self.costs.observe_annex(shape, annexed, result.annex_seconds, result.moving_seconds)
            seconds -= result.annex_seconds
        works = _in_pool(plan.works)
        if plan.n_apart:
            self.costs.observe(shape, self._load(works[: plan.n_apart], plan.n_apart), 0, result.apart_seconds)
            seconds -= result.apart_seconds
        if last := works[plan.n_apart :]:
            self.costs.observe(shape, self._load(last, n_streams - plan.n_apart), plan.pad_to, seconds)

    def _placed(self, works: list[Work], n_streams: int) -> list[Work]:
        """The works, those of prompts that suit the annex marked for it where that is quicker."""
        shape = self._pool.shape
        if not shape.annex_cells or len(works) == n_streams:
            return works
        placed = works[:n_streams]
        placed += [replace(work, in_annex=_suits_annex(work, shape)) for work in works[n_streams:]]
        loads = [AnnexLoad(len(work.tokens), work.start) for work in placed if work.in_annex]
        if not loads:
            return works
        seconds = sum(self.costs.annex_seconds(shape, load) for load in loads) + self._seconds(_in_pool(placed), n_streams)
        return placed if seconds < self._seconds(works, n_streams) * APART_GAIN else works

    def _seconds(self, works: Sequence[Work], n_streams: int) -> float:
        """Of a step of these works in the pool, however it is shaped best."""
        if not works:
            return 0.0
        together = self._filled(self._load(works, n_streams))
        if not 0 < n_streams < len(works):
            return together
        apart = self.costs.expected_seconds(self._pool.shape, self._load(works[:n_streams], n_streams))
        return min(together, apart + self._filled(self._load(works[n_streams:], 0)))

    def _are_better_apart(self, works: Sequence[Work], n_streams: int) -> bool:
        shape = self._pool.shape
        if not 0 < n_streams < len(works) or not shape.can_pad or shape.layout is Layout.STREAMS:
            return False
        streams, prompts = self._load(works[:n_streams], n_streams), self._load(works[n_streams:], 0)
        apart = self.costs.expected_seconds(shape, streams) + self._filled(prompts)
        return apart < self._filled(self._load(works, n_streams)) * APART_GAIN

    def _filled(self, load: Load) -> float:
        shape = self._pool.shape
        return self.costs.expected_seconds(shape, load, self.costs.padding(shape, load))

    def _load(self, works: Sequence[Work], n_streams: int) -> Load:
        """`works`, the first `n_streams` of them streams."""
        if self._pool.shape.layout is Layout.STREAMS:
            return _load_in_streams(works)
        prompts = works[n_streams:]
        n_tokens = sum(len(work.tokens) for work in prompts)
        rows_attend = sum(work.start for work in works[:n_streams])
        attended = rows_attend + sum(work.start * len(work.tokens) + len(work.tokens) ** 2 // 2 for work in prompts)
        used = self._pool.used_cells + sum(len(work.tokens) for work in works)
        return Load(n_streams, n_tokens, attended, self._cells(works), self._cells(prompts) if prompts else 0, used)

    def _cells(self, works: Iterable[Work]) -> int:
        """Distinct cells that they attend to, their own tokens included."""
        works = list(works)
        n_tokens = sum(len(work.tokens) for work in works)
        if not self._pool.cells_are_shared:
            return n_tokens + sum(work.start for work in works)
        return n_tokens + self._pool.distinct_cells(self._pool.sequences[work.sequence] for work in works)


def _suits_annex(work: Work, shape: PoolShape) -> bool:
    """It fits, and is a tile or all that is left of a prompt."""
    fits = work.start + len(work.tokens) <= shape.annex_cells
    return fits and (len(work.tokens) >= shape.tile_tokens or work.sampler is not None)


def _in_pool(works: Sequence[Work]) -> list[Work]:
    return [work for work in works if not work.in_annex]


def _load_in_streams(works: Iterable[Work]) -> Load:
    """Sorted by sequence, not streams first; prompts are tiles of their own, which walk over what is theirs."""
    sizes = [(len(work.tokens) + work.pad_tokens, work.start) for work in works]
    rows = [start for size, start in sizes if size == 1]
    return Load(len(rows), sum(size for size, _ in sizes) - len(rows), sum(rows), sum(rows), 0)
