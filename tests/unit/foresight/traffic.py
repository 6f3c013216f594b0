"""Synthetic traffic: a few conversations that come back, many that never do, and a head that all have in common."""

from __future__ import annotations

import random
from itertools import count

from pasture.foresight.traces import TRACE_BLOCK_TOKENS, TraceRequest


def request(at: float, blocks: list[int]) -> TraceRequest:
    return TraceRequest(at, len(blocks) * TRACE_BLOCK_TOKENS, tuple(blocks))


def traffic(n_requests: int, *, regulars: int = 6, seed: int = 7) -> list[TraceRequest]:
    """Every other request is a regular's next turn, about a minute after the one before; the rest come once."""
    rng = random.Random(seed)
    ids = count(1)
    held = [[0, *(next(ids) for _ in range(4))] for _ in range(regulars)]
    requests = []
    for number in range(n_requests):
        at = number * 5.0 + rng.random()
        if number % 2:
            mine = held[number // 2 % regulars]
            mine += [next(ids)]
            if len(mine) > 24:
                mine[:] = [0, *(next(ids) for _ in range(4))]
            requests.append(request(at, list(mine)))
        else:
            requests.append(request(at, [0, *(next(ids) for _ in range(rng.randint(3, 12)))]))
    return requests
