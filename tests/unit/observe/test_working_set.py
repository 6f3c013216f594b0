"""Reuse distances against a brute-force LRU, and the size that would do."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from pasture.observe import pool_too_small, read_log
from pasture.observe.requests import LoggedRequest
from pasture.observe.working_set import reuse_distances

BLOCK = 256


def log_of(contents: Sequence[str]) -> list[LoggedRequest]:
    return read_log(json.dumps({"messages": [{"role": "user", "content": content}]}) for content in contents)


def hits(uses: Sequence[int], n_blocks: int) -> int:
    """Of a cache that drops what was least recently used."""
    cache: OrderedDict[int, None] = OrderedDict()
    found = 0
    for block in uses:
        found += block in cache
        cache[block] = None
        cache.move_to_end(block)
        while len(cache) > n_blocks:
            cache.popitem(last=False)
    return found


@given(st.lists(st.integers(0, 8), max_size=60), st.integers(1, 9))
def test_distances_predict_what_a_cache_of_any_size_finds(uses: list[int], n_blocks: int) -> None:
    distances = reuse_distances(log_of([str(block) * BLOCK for block in uses]))
    assert sum(distance < n_blocks for distance in distances) == hits(uses, n_blocks)


def test_a_pool_too_small_is_told_the_size_that_would_do() -> None:
    documents = [f"{i}" * BLOCK * 16 for i in range(8)] * 4
    (requests, small) = (log_of(documents), 2048)
    finding = pool_too_small(requests, small)
    assert finding is not None
    assert "2,048 cells keep 0%" in finding.evidence
    assert "--kv-cells 8192," in finding.advice
    assert pool_too_small(requests, 8192) is None


def test_without_reuse_no_pool_is_too_small() -> None:
    assert pool_too_small(log_of([f"{i}" * 5000 for i in range(9)]), 64) is None


def test_what_tenants_cannot_share_is_not_reuse() -> None:
    entries = [{"tenant": tenant, "messages": [{"role": "user", "content": "same " * 200}]} for tenant in "ab"]
    assert reuse_distances(read_log(map(json.dumps, entries))) == []
