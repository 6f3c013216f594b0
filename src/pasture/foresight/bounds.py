"""How much of a trace anybody could have foreseen: a bound for what is fetched before a conversation returns.

A prefetcher that guesses *when* knows at best how likely each conversation is to return just now. This one knows these rates
better than anybody can: they are taken from the whole trace, the future included, for each class of conversations at each age.
It keeps RAM full of those that are likeliest at every instant, at no cost, and is right whenever one of them returns. What it
does not have, no prefetcher could have that goes by the same classes; only one that knows the very moments does better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pasture.foresight.replay import key_of
from pasture.foresight.returns import EDGES, N_BINS
from pasture.foresight.reuse import ReuseModel, Visit
from pasture.foresight.traces import TRACE_BLOCK_TOKENS, TraceRequest

Column = NDArray[np.float64]


@dataclass(slots=True)
class _Stay:
    """A conversation between two requests, as it turned out."""

    since: float
    until: float
    category: int
    n_blocks: int
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
        if n_blocks[waiting][rates > mine].sum() + stay.n_blocks <= ram_tokens // TRACE_BLOCK_TOKENS:
            covered += stay.n_used
    return covered / max(1, total)


def _row(stay: _Stay) -> tuple[float, float, float, float]:
    return stay.since, stay.until, stay.category, stay.n_blocks


def _stays(requests: Sequence[TraceRequest]) -> tuple[list[_Stay], ReuseModel]:
    """Every stay of the trace, and a model that has seen all of it."""
    model = ReuseModel()
    stays: list[_Stay] = []
    current: dict[int, _Stay] = {}
    """id of a visit -> its stay"""
    kept: list[Visit] = []
    """so that no id is used twice"""
    seen: set[int] = set()
    for request in requests:
        path = [key_of(block) for block in request.blocks]
        before = model.continued(path)
        n_known = next((i for i, block in enumerate(request.blocks) if block not in seen), len(path))
        seen.update(request.blocks)
        visit = model.arrived(path, request.at)
        if before is not None and (stay := current.pop(id(before), None)) is not None:
            stay.until, stay.n_used = request.at, n_known
        stay = _Stay(request.at, float("inf"), visit.wait.category, len(path))
        stays.append(stay)
        current[id(visit)] = stay
        kept.append(visit)
    return stays, model
