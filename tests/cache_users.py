"""What servers do to a disk cache, for tests that run several or kill them; a module of its own so that children start fast."""

from __future__ import annotations

import os
import random
import time
from array import array
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

from pasture.tiers.block import Block
from pasture.tiers.disk import DiskTier
from tests.blocks import block_at, blocks, conversation, leading, same

N_CONVERSATIONS = 6
PIECE_BYTES = 512


def told(rng: random.Random) -> array[int]:
    """One of a few conversations, which have beginnings in common."""
    n_tokens = rng.choice((64, 100, 200, 300))
    return conversation(rng.randrange(4), 64) + conversation(rng.randrange(N_CONVERSATIONS), n_tokens)


def size_of(block: Block) -> int:
    """Bytes of its payload; the same whoever writes it."""
    return 1000 * (1 + block.address.key[0] % 100)


def expected(tokens: array[int]) -> list[Block]:
    return [block_at(block.address, tokens, size_of(block)) for block in blocks(tokens, 0)]


def use(tier: DiskTier, rng: random.Random) -> Counter[str]:
    """Look a conversation up as a server would, compare what comes back, and store what was missing."""
    seen = Counter[str]()
    tokens = told(rng)
    wanted = expected(tokens)
    n_stored = leading(tier, [block.address for block in wanted])
    for index, block in enumerate(wanted):
        found = tier.get(block.address)
        seen["hit" if found is not None else "miss"] += 1
        seen["promised"] += index < n_stored
        seen["broken"] += index < n_stored and found is None
        seen["wrong"] += found is not None and not same(found, block)
        if found is None:
            tier.put(block)
    return seen


def write_until_killed(directory: Path, budget_bytes: int, seed: int, ready: Connection) -> None:
    """Ends by itself only where something is wrong. Writes in pieces, so that files are half written at many moments."""
    write = os.write
    os.write = lambda descriptor, data: write(descriptor, memoryview(data)[:PIECE_BYTES])
    tier = DiskTier(directory, budget_bytes)
    rng = random.Random(seed)
    ready.send(None)
    while not (seen := use(tier, rng))["wrong"] and not seen["broken"]:
        pass


def share(directory: Path, budget_bytes: int, seed: int, seconds: float, answer: Connection) -> None:
    """What a server does to a directory that it does not have to itself."""
    tier = DiskTier(directory, budget_bytes)
    rng = random.Random(seed)
    seen = Counter[str]()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        seen += use(tier, rng)
    figures = tier.statistics()
    seen.update(damaged=figures.damaged_blocks, errors=figures.errors, written_bytes=figures.written_bytes)
    tier.close()
    answer.send(dict(seen))
