"""How much of a trace anybody could have foreseen: a bound for what is fetched before a conversation returns.

A prefetcher that guesses *when* knows at best how likely each conversation is to return just now. This one knows these rates
better than anybody can: they are taken from the whole trace, the future included, for each class of conversations at each age.
It keeps RAM full of those that are likeliest at every instant, at no cost, and is right whenever one of them returns. What it
does not have, no prefetcher could have that goes by the same classes and by age; one that knows more of a conversation may
do better. A wait begins when the reply ends, where the trace says when, and is of the kind that the reply waits for.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from pasture.core.storage import BlockKey
from pasture.core.values import Kind
from pasture.foresight.replay import key_of
from pasture.foresight.returns import EDGES, N_BINS
from pasture.foresight.reuse import ReuseModel, Visit
from pasture.foresight.traces import TRACE_BLOCK_TOKENS, TraceRequest

Column = NDArray[np.float64]


@dataclass(slots=True)
class _Stay:
    """A conversation between the end of a request and the next one, as it turned out."""

    visit: Visit
    until: float = inf
    n_used: int = 0
    """of its blocks, what the next request used"""


def foreseeable(requests: Sequence[TraceRequest], ram_tokens: int) -> float:
    """The share of the blocks with which conversations go on that such a RAM could have had when they were asked for."""
    stays, model = _stays(requests)
    model.refresh(requests[-1].at)
    since, until, category, n_blocks = (np.array(column) for column in zip(*map(_row, stays), strict=True))
    hazards = model.returns.hazards
    covered, total = 0, 0
    for index, stay in enumerate(stays):
        if not stay.n_used:
            continue
        total += stay.n_used
        waiting = (since < stay.until) & (until >= stay.until)
        waiting[index] = True  # even where it returns at once
        ages = np.searchsorted(EDGES, stay.until - since[waiting], side="right") - 1
        rates: Column = hazards[category[waiting].astype(int), np.clip(ages, 0, N_BINS - 1)]
        mine = rates[np.count_nonzero(waiting[:index])]
        if n_blocks[waiting][rates > mine].sum() + stay.visit.n_blocks <= ram_tokens // TRACE_BLOCK_TOKENS:
            covered += stay.n_used
    return covered / max(1, total)


def _row(stay: _Stay) -> tuple[float, float, float, float]:
    wait = stay.visit.wait
    return wait.since, stay.until, wait.category, stay.visit.n_blocks


def _stays(requests: Sequence[TraceRequest]) -> tuple[list[_Stay], ReuseModel]:
    """Every stay of the trace, and a model that has seen all of it."""
    model = ReuseModel()
    stays: dict[Visit, _Stay] = {}
    endings: list[tuple[float, int, list[BlockKey], Kind]] = []
    seen: set[int] = set()

    def end_until(at: float) -> None:
        while endings and endings[0][0] <= at:
            ended_at, _, path, kind = heapq.heappop(endings)
            model.finished(path, kind, ended_at)

    for number, request in enumerate(requests):
        end_until(request.at)
        path = [key_of(block) for block in request.blocks]
        before = model.continued(path)
        n_known = next((i for i, block in enumerate(request.blocks) if block not in seen), len(path))
        seen.update(request.blocks)
        visit = model.arrived(path, request.at)
        if before is not None and (stay := stays[before]).until == inf:
            stay.until, stay.n_used = request.at, n_known
        stays.setdefault(visit, _Stay(visit))
        ended_at = request.at if request.finished_at is None else request.finished_at
        heapq.heappush(endings, (ended_at, number, path, request.expects))
    end_until(inf)
    return list(stays.values()), model
