"""Where prompts have parted: the memory of those models whose state cannot be cut.

What such a model has computed is worth something to another prompt only where it was saved exactly where the two part, so that
place has to be known while the second one is computed. The first is often gone from the live cache by then; what stays of it
here is a hash for each of its blocks, chained as the tiers' keys are. A hash that two prompts share by accident costs a
checkpoint that nobody uses. Engine thread.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator

from pasture.core.storage import BLOCK_TOKENS
from pasture.core.values import Namespace

REMEMBERED_BLOCKS = 1 << 16
"""4 million tokens of prompts, some 10 MB"""


class Branches:
    def __init__(self, remembered: int = REMEMBERED_BLOCKS) -> None:
        self._remembered = remembered
        self._seen: OrderedDict[int, None] = OrderedDict()
        """longest unused first"""

    def part(self, namespace: Namespace, tokens: array[int]) -> int:
        """How many leading tokens, in whole blocks, a prompt before this one had too. From now on this one is such a prompt."""
        common, parted = 0, False
        for end, key in _chain(namespace, tokens):
            if not parted and key in self._seen:
                common = end
            else:
                parted = True
            self._seen[key] = None
            self._seen.move_to_end(key)
        while len(self._seen) > self._remembered:
            self._seen.popitem(last=False)
        return common


def _chain(namespace: Namespace, tokens: array[int]) -> Iterator[tuple[int, int]]:
    """Every whole block's end, and what stands for all up to there."""
    key = hash(namespace)
    for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        key = hash((key, tokens[start : start + BLOCK_TOKENS].tobytes()))
        yield start + BLOCK_TOKENS, key
