"""Whether two servers gave the same greedy reply, and where they did not, whether that was a near tie.

Equal KV in equal cells gives an equal reply. In other cells, llama.cpp adds the same terms in another order (on a CPU it keeps
a row's sum over the cells as 16-bit floats), so log probabilities move by some hundredths and greedy replies part where two
tokens are about as likely. Where they part otherwise, something was restored wrongly. Pure; any thread.
"""

from __future__ import annotations

from collections.abc import Sequence

from pasture.bench.client import Exchange
from pasture.bench.systems import SystemFailed

TOP_LOGPROBS = 20
"""to ask for with each token"""
TIE_NATS = 0.5
"""Two tokens this near count as a tie. One KV of 1,900 tokens of SmolLM2, on a CPU: in the same cells, six texts of 32 tokens
were the same; behind 1,000 other cells all six parted, at 0.02 to 0.15 nats, and before that a token's log probability had
moved by up to 0.38."""


def gap(one: Exchange, other: Exchange) -> float:
    """How far apart, in nats, the two tokens are at which the replies part; 0 for equal replies.

    The larger of the two sides' own views. A token that is not among a side's likeliest counts as likely as the last of
    them. Raises SystemFailed when a side drew more tokens than the other, or told none.
    """
    if not one.drawn or len(one.drawn) != len(other.drawn):
        raise SystemFailed(
            f"replies of {len(one.drawn)} and {len(other.drawn)} tokens with log probabilities: cannot be compared"
        )
    for mine, theirs in zip(one.drawn, other.drawn, strict=True):
        if mine.token != theirs.token:
            return max(mine.lead(theirs.token), theirs.lead(mine.token))
    return 0.0


def agree(gaps: Sequence[float]) -> bool:
    """Every pair of replies is equal or parts at a tie; not so of no pair at all."""
    return bool(gaps) and all(each <= TIE_NATS for each in gaps)


def told(gaps: Sequence[float]) -> str:
    """For a table: how many replies were equal, and at which gap at most the others part."""
    parted = [each for each in gaps if each]
    equal = f"{len(gaps) - len(parted)} of {len(gaps)}"
    return f"{equal}, others at {max(parted):.2f} nats" if parted else equal
