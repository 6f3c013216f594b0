"""How large a pool a log's traffic needs: reuse distances of its blocks under "least recently used goes first".

A block's reuse distance is how many other blocks were used since its last use. A pool of that many blocks, and no smaller one,
would still have had it (Mattson et al., 1970). Blocks are 64 tokens of four characters, and stand for everything before them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from pasture.core.storage import BLOCK_TOKENS
from pasture.observe.findings import Finding
from pasture.observe.requests import LoggedRequest

_CHARACTERS_A_TOKEN = 4
_ENOUGH = 0.8
"""of what could be reused: a pool that keeps so much is not called too small"""
_WOULD_DO = 0.95
_ROUND_CELLS = 256


def pool_too_small(requests: Sequence[LoggedRequest], n_cells: int) -> Finding | None:
    """What a pool of `n_cells` would lose that a larger one would keep."""
    distances = sorted(reuse_distances(requests))
    if not distances:
        return None
    kept = sum(distance * BLOCK_TOKENS < n_cells for distance in distances) / len(distances)
    if kept >= _ENOUGH:
        return None
    blocks = distances[min(len(distances) - 1, int(_WOULD_DO * len(distances)))] + 1
    wanted = -(-blocks * BLOCK_TOKENS // _ROUND_CELLS) * _ROUND_CELLS
    return Finding(
        "pool_too_small",
        "the live cache is too small for what people come back to",
        f"{n_cells:,} cells keep {kept:.0%} of the {len(distances) * BLOCK_TOKENS:,} prompt tokens that could be reused",
        f"{wanted:,} cells would keep {_WOULD_DO:.0%}: --kv-cells {wanted}, or as much --kv-ram",
    )


def reuse_distances(requests: Sequence[LoggedRequest]) -> list[int]:
    """Of each use of a block but its first, in order. O(uses log uses)."""
    uses = [block for request in requests for block in _blocks(request)]
    latest = _Sums(len(uses))
    last: dict[bytes, int] = {}
    distances = []
    for now, block in enumerate(uses):
        before = last.get(block)
        if before is not None:
            distances.append(latest.between(before + 1, now))
            latest.add(before, -1)
        latest.add(now, 1)
        last[block] = now
    return distances


def _blocks(request: LoggedRequest) -> Iterator[bytes]:
    text = "".join((*request.tools, *(f"{message.role}\n{message.content}\n" for message in request.messages)))
    size = BLOCK_TOKENS * _CHARACTERS_A_TOKEN
    key = (request.tenant or "").encode()
    for start in range(0, len(text) - size + 1, size):
        key = hashlib.blake2b(key + text[start : start + size].encode(), digest_size=16).digest()
        yield key


class _Sums:
    """Sums over ranges of an array that changes (a Fenwick tree)."""

    def __init__(self, n: int) -> None:
        self._tree = [0] * (n + 1)

    def add(self, index: int, value: int) -> None:
        index += 1
        while index < len(self._tree):
            self._tree[index] += value
            index += index & -index

    def between(self, start: int, end: int) -> int:
        """Of `[start, end)`."""
        return self._upto(end) - self._upto(start)

    def _upto(self, end: int) -> int:
        total = 0
        while end:
            total += self._tree[end]
            end -= end & -end
        return total
