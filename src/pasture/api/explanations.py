"""Why a prompt was or was not in the cache, in words that a program can read: the `cache` of `pasture: true`.

    new                 nobody in this namespace has asked for it, as far as is remembered
    evicted             it was there, and has made way for something else
    edited_history      what was said before is not what it was
    template_changed    the same was said, with other tools or template variables around it
    not_fetched         it rests somewhere, and computing it was cheaper than fetching it, or the only way

Known for certain: where the prompt's beginning was when the request came, and how much of it was reused in the end (prefills of
others that were under way count). The reason is the first missed token's. Nothing here depends on what other namespaces hold:
an answer that told "somebody else has it" would tell what they ask.
"""

from __future__ import annotations

from dataclasses import dataclass

from pasture.core.storage import BLOCK_TOKENS
from pasture.core.values import Usage, Whereabouts

Json = dict[str, object]


@dataclass(frozen=True, slots=True)
class Past:
    """What is known of the conversation that a request goes on with."""

    n_tokens: int
    """as it was when it was used last"""
    edited_at: int | None = None
    """the first message that differs from what was said; None: the conversation only goes on"""
    template_changed: bool = False
    """whether something else differs that its prompt is made from"""


def explain(usage: Usage, found: Whereabouts, n_asked: int, past: Past | None) -> Json:
    """One choice's explanation. `n_asked`: tokens from the prompt's beginning that were asked for before."""
    missed = usage.prompt_tokens - usage.cached_tokens
    told: Json = {"prompt_tokens": usage.prompt_tokens, "cached_tokens": usage.cached_tokens, "computed_tokens": missed}
    told["found"] = {
        "live": found.live_tokens,
        "shared": found.shared_tokens,
        "ram": found.ram_tokens,
        **found.slow_tokens,
    }
    told["first_missed_position"] = usage.cached_tokens if missed > 1 else None
    told["reason"] = None if missed <= 1 else _reason(usage.cached_tokens, found, n_asked, past)
    if past is not None and past.edited_at is not None:
        told["first_edited_message"] = past.edited_at
    return told


def _reason(cached: int, found: Whereabouts, n_asked: int, past: Past | None) -> str:
    """See the module. The last block of what was said may be computed again without anything having been evicted."""
    if max(found.live_tokens, found.ram_tokens, *found.slow_tokens.values()) - cached >= BLOCK_TOKENS:
        return "not_fetched"
    if n_asked - cached >= BLOCK_TOKENS:
        return "evicted"
    if past is not None:
        lost = past.n_tokens - cached > BLOCK_TOKENS
        if past.template_changed and lost:
            return "template_changed"
        if past.edited_at is not None:
            return "edited_history"
        if lost:
            return "evicted"
    return "new"
