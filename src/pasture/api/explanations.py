"""Why a prompt was or was not in the cache, in words that a program can read: the `cache` of `pasture: true`.

Known for certain: where the prompt's beginning was when the request came, and how much of it was reused in the end (prefills of
others that were under way count). Why the rest was not there is known inside a session, where what was said before is known;
without one, new and evicted text look alike.
"""

from __future__ import annotations

from pasture.api.joining import Joined
from pasture.core.values import Usage, Whereabouts

Json = dict[str, object]

SLACK_TOKENS = 64
"""a block: so much of what was said last may be computed again without anything having been evicted"""


def explain(usage: Usage, found: Whereabouts | None, joined: Joined | None) -> Json:
    """One choice's explanation."""
    missed = usage.prompt_tokens - usage.cached_tokens
    told: Json = {"prompt_tokens": usage.prompt_tokens, "cached_tokens": usage.cached_tokens, "computed_tokens": missed}
    if found is not None:
        told["found"] = {"live": found.live_tokens, "shared": found.shared_tokens, "ram": found.ram_tokens}
    told["first_missed_position"] = usage.cached_tokens if missed > 1 else None
    told["reason"] = _reason(usage, missed, joined)
    if joined is not None and joined.edited_at is not None:
        told["first_edited_message"] = joined.edited_at
    return told


def _reason(usage: Usage, missed: int, joined: Joined | None) -> str | None:
    """Why tokens were missed: edited_history, evicted, new, new_or_evicted; None where none were."""
    if missed <= 1:  # the last token is always computed: its logits are what the reply begins with
        return None
    if joined is None or joined.session_id is None:
        return "new_or_evicted"
    if joined.edited_at is not None:
        return "edited_history"
    return "evicted" if usage.cached_tokens + SLACK_TOKENS < joined.n_tokens_before else "new"
