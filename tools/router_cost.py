"""What the cluster's router costs: processor time a decision, an event and a snapshot, and memory a known block.

Run it with `python tools/router_cost.py`; takes a few seconds. Replicas hold what a 64 GB cache of a small model would, prompts
hit half of their blocks, and a decision is counted with what belongs to it: `place`, `started`, `progress`, `finished`.
"""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import blake2b
from time import process_time

from rich.console import Console
from rich.table import Table

from pasture.cluster.router import Router
from pasture.cluster.values import Capacity, Delta, Epoch, Placement, ReplicaId, SessionKey, Snapshot
from pasture.core.storage import BLOCK_TOKENS, BlockKey
from pasture.core.values import RequestId

EPOCH = Epoch(1)
REPLICAS = (2, 8, 64)
PROMPT_BLOCKS = (32, 1600)
"""prompts of 2,000 and of 100,000 tokens"""
HELD_BLOCKS = 20_000
"""by each replica"""
MEASURE_SECONDS = 0.5


def keys(name: str, n: int) -> tuple[BlockKey, ...]:
    return tuple(BlockKey(blake2b(f"{name}/{index}".encode(), digest_size=32).digest()) for index in range(n))


def router_of(n_replicas: int) -> Router:
    router = Router(pull_seconds=lambda n_tokens: n_tokens * 1e-5)
    for number in range(n_replicas):
        router.join(ReplicaId(f"replica-{number}"), EPOCH, Capacity(1000.0))
        router.observe(Snapshot(ReplicaId(f"replica-{number}"), EPOCH, 1, keys(f"held-{number}", HELD_BLOCKS)))
    return router


def seconds_each(calls: Iterator[Callable[[], object]]) -> float:
    """Of processor time, over as many as fit."""
    began, n = process_time(), 0
    while process_time() - began < MEASURE_SECONDS:
        next(calls)()
        n += 1
    return (process_time() - began) / n


def decisions(router: Router, n_replicas: int, n_blocks: int) -> Iterator[Callable[[], object]]:
    held = [keys(f"held-{number}", n_blocks // 2) for number in range(n_replicas)]
    new = keys("new", n_blocks - n_blocks // 2)

    def decide(number: int) -> None:
        session = SessionKey(f"session-{number % 1000}") if number % 2 else None
        placement = Placement(held[number % n_replicas] + new, n_blocks * BLOCK_TOKENS, session)
        decision = router.place(placement)
        assert decision is not None
        request = RequestId(str(number))
        router.started(request, placement, decision)
        router.progress(request, 0)
        router.finished(request)

    number = 0
    while True:
        number += 1
        yield partial(decide, number)


def events(router: Router, n_blocks: int) -> Iterator[Callable[[], object]]:
    """A replica stores a prompt's blocks, and drops as many others."""
    a, b = keys("a", n_blocks), keys("b", n_blocks)
    number = 1
    while True:
        number += 1
        a, b = b, a
        yield partial(router.observe, Delta(ReplicaId("replica-0"), EPOCH, number, a, b))


def bytes_a_block() -> float:
    held = keys("held-0", HELD_BLOCKS)
    tracemalloc.start()
    router = Router()
    router.join(ReplicaId("replica"), EPOCH, Capacity(1000.0))
    before, _ = tracemalloc.get_traced_memory()
    router.observe(Snapshot(ReplicaId("replica"), EPOCH, 1, held))
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return (after - before) / HELD_BLOCKS + sys.getsizeof(held[0])


def main() -> None:
    table = Table(title="The router, in microseconds of processor time")
    for name in ("replicas", "blocks a prompt", "a decision", "decisions/s", "an event of so many blocks"):
        table.add_column(name, justify="right")
    for n_replicas in REPLICAS:
        router = router_of(n_replicas)
        for n_blocks in PROMPT_BLOCKS:
            decision = seconds_each(decisions(router, n_replicas, n_blocks))
            event = seconds_each(events(router_of(1), n_blocks))
            table.add_row(
                str(n_replicas), f"{n_blocks:,}", f"{decision * 1e6:,.0f}", f"{1 / decision:,.0f}", f"{event * 1e6:,.0f}"
            )
    Console().print(table)
    print(f"Memory: {bytes_a_block():.0f} bytes a known block, its key included.")


if __name__ == "__main__":
    main()
