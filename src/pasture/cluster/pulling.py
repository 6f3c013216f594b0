"""Whether one replica should fetch KV from another, or recompute it: by what fetches took here, and what prompts take.

A prior stands for a gigabit's worth of network until something was fetched. Pure; one thread.
"""

from __future__ import annotations

from pasture.tiers.gate import Rate

PRIOR_BYTES_PER_SECOND = 100e6
CALL_SECONDS = 0.01
"""to ask, to pack and to check, however little it is"""


class PullCosts:
    def __init__(self, cell_bytes: int) -> None:
        """`cell_bytes`: KV of a token; 0 for models whose state is no sum of tokens, which are never fetched."""
        self._cell_bytes = cell_bytes
        self._rate = Rate(PRIOR_BYTES_PER_SECOND)
        self._prefill_tokens_per_second = 1000.0

    @property
    def bytes_per_second(self) -> float:
        return self._rate.per_second

    def seconds(self, n_tokens: int) -> float | None:
        """How long fetching so many tokens' KV takes; None where recomputing wins."""
        if n_tokens <= 0 or not self._cell_bytes:
            return None
        fetching = CALL_SECONDS + n_tokens * self._cell_bytes / self._rate.per_second
        return fetching if fetching < n_tokens / self._prefill_tokens_per_second else None

    def observe(self, n_bytes: int, seconds: float) -> None:
        """A fetch took so long."""
        self._rate.observe(n_bytes, seconds)

    def observe_prefill(self, tokens_per_second: float) -> None:
        """What recomputing does at present, on a replica."""
        if tokens_per_second > 0:
            self._prefill_tokens_per_second = tokens_per_second
