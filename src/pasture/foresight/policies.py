"""The eviction policies that a tier can be given, by name: `--kv-policy`, and `pasture simulate --policy`.

lru          what was used longest ago goes first
s3fifo       new blocks pass a small queue; only what is used again gets into the large one
foresight    what is least worth keeping goes first, and nothing comes in for which something better would have to go
"""

from __future__ import annotations

from typing import Protocol

from pasture.core.ports import Clock
from pasture.foresight.expected import ExpectedSaving, FetchPrice, nothing_behind
from pasture.foresight.reuse import ReuseModel
from pasture.foresight.s3fifo import S3Fifo
from pasture.tiers.eviction import PolicyMaker, least_recently_used


class Policy(Protocol):
    """What makes a tier's policies: one for each owner, who have common what they have learnt."""

    def __call__(self, clock: Clock, fetch_price: FetchPrice = nothing_behind) -> PolicyMaker: ...


def _lru(clock: Clock, fetch_price: FetchPrice = nothing_behind) -> PolicyMaker:
    return least_recently_used


def _s3fifo(clock: Clock, fetch_price: FetchPrice = nothing_behind) -> PolicyMaker:
    return S3Fifo


def _foresight(clock: Clock, fetch_price: FetchPrice = nothing_behind) -> PolicyMaker:
    model = ReuseModel()  # one for all the owners of a tier, so that each can value the others' blocks
    return lambda wanted: ExpectedSaving(wanted, clock, model, fetch_price)


POLICIES: dict[str, Policy] = {"lru": _lru, "s3fifo": _s3fifo, "foresight": _foresight}
