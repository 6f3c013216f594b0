"""What has been asked for: a hash for each whole block of the prompts so far, chained as the tiers' keys are.

Small beside the KV that it stands for, and kept longer. A hash that two prompts share by accident makes a longer beginning look
known; whoever asks here only guesses or explains with it. One thread's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from pasture.core.storage import BLOCK_TOKENS
from pasture.core.values import Namespace

MAX_BLOCKS = 1 << 14
"""remembered: a million tokens of prompts, some 2 MB"""


class Asked:
    """Those asked for longest ago are forgotten."""

    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        self._max_blocks = max_blocks
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def note(self, namespace: Namespace, prompt: Sequence[int]) -> int:
        """Remember a prompt; returns how many of its leading tokens, in whole blocks, one before it had too."""
        common, parted = 0, False
        for end, block in _chain(namespace, prompt):
            parted = parted or block not in self._blocks
            common = common if parted else end
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)
        return common

    def __len__(self) -> int:
        """Blocks remembered."""
        return len(self._blocks)


def _chain(namespace: Namespace, prompt: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Every whole block's end, and what stands for all up to there."""
    block = hash(namespace)
    for end in range(BLOCK_TOKENS, len(prompt) + 1, BLOCK_TOKENS):
        block = hash((block, tuple(prompt[end - BLOCK_TOKENS : end])))
        yield end, block
