"""What a running server's own numbers say is wrong. Reads what its public routes answer (`/v1/live/now`, `/v1/diagnosis`,
`/props`, `/apply-template`); asks nobody itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pasture.observe.findings import Finding

Json = Mapping[str, Any]

_BLOCK_TOKENS = 64

_THOUGHT = "a thought of the pasture doctor's"
TEMPLATE_PROBE: Json = {
    "messages": [
        {"role": "user", "content": "How many sheep?"},
        {"role": "assistant", "content": f"<think>{_THOUGHT}</think>\n\nForty."},
        {"role": "user", "content": "And goats?"},
    ]
}
"""what `/apply-template` is asked: does a reply come back as it was generated?"""


def examine_server(live: Json, diagnosis: Json, props: Json | None) -> list[Finding]:
    """Everything that is wrong now, from one server's answers of about the same moment; `props` is None where it is closed."""
    return [
        *_diagnosed(diagnosis),
        *(() if props is None else _model(props)),
        *_pool(live, diagnosis),
        *_layout(live),
        *_line(live),
        *_tiers(live),
    ]


def examine_template(prompt: str) -> list[Finding]:
    """Whether the chat template leaves replies as they were generated; `prompt`: what it makes of TEMPLATE_PROBE."""
    if _THOUGHT in prompt:
        return []
    return [
        Finding(
            "template_strips_reasoning",
            "the chat template takes reasoning out of earlier replies, so a conversation parts from its own past",
            "<think>...</think> of an earlier reply is not in the prompt that the template makes of it",
            "leave --turn-ahead on, which computes the next turn's beginning while nobody asks; or a template that keeps it "
            "(--chat-template-file)",
        )
    ]


def _diagnosed(diagnosis: Json) -> Iterator[Finding]:
    for check in diagnosis["checks"]:
        if check["status"] == "warning":
            what, _, advice = check["message"].partition("; ")
            facts = ", ".join(f"{name} {value}" for name, value in check["facts"].items() if not isinstance(value, dict))
            yield Finding(check["name"], what, facts or "see /v1/diagnosis", advice or "see /v1/diagnosis")


def _model(props: Json) -> Iterator[Finding]:
    if not props["model"]["shareable"]:
        yield Finding(
            "not_shareable",
            "conversations share whole or not at all with this model",
            f"{props['model']['architecture']}: parts of its state cannot be joined, or flash attention is off",
            "flash attention on (-fa on); a recurrent model cannot share parts",
        )


def _pool(live: Json, diagnosis: Json) -> Iterator[Finding]:
    """Evicted for lack of room, more than once over: the working set is larger than the pool."""
    pool, headline = live["pool"], live["headline"]
    facts: Json = next((check["facts"] for check in diagnosis["checks"] if check["name"] == "low_hit_rate"), {})
    evicted = facts.get("evicted_cells", {}).get("cells", 0)
    suffers = live["requests"]["swapped"] > 0 or headline["computed_tokens"] >= headline["reused_tokens"]
    if evicted <= pool["cells"] or not suffers:
        return
    resting = sum(tier["blocks"] for tier in live["tiers"]) * _BLOCK_TOKENS
    wanted = pool["used_cells"] + max(resting, evicted)
    yield Finding(
        "pool_too_small",
        "the live cache is too small for what people come back to",
        f"{evicted:,} tokens were evicted for lack of room, from {pool['cells']:,} cells",
        f"about {wanted:,} cells would hold what is in use and what was evicted: --kv-cells {wanted}, or more --kv-ram",
    )


def _layout(live: Json) -> Iterator[Finding]:
    pool = live["pool"]
    if pool["layout"] != "streams" or not pool["used_cells"]:
        return
    twice = sum(tokens * (holders - 1) for _, _, _, _, tokens, holders, *_ in live["prefixes"])
    if twice > 0.5 * pool["used_cells"]:
        yield Finding(
            "wrong_layout",
            "conversations have much in common, and the layout keeps a copy for each",
            f"{twice:,} of {pool['used_cells']:,} used cells are copies",
            "--kv-layout auto (follows the traffic) or --kv-layout unified",
        )


def _line(live: Json) -> Iterator[Finding]:
    requests = live["requests"]
    if requests["rejected"]:
        yield Finding(
            "turned_away",
            "people were turned away because the line was full",
            f"{requests['rejected']:,} turned away, {requests['submitted']:,} taken; {requests['waiting']} wait now",
            "the machine is small for the traffic: another one, shorter replies, or a longer line (--max-queue)",
        )


def _tiers(live: Json) -> Iterator[Finding]:
    refused = live["gate"]["refusals"].get("fetch", 0)
    if refused:
        rates = ", ".join(f"{tier['name']} {tier['bytes_per_second'] / 1e6:,.0f} MB/s" for tier in live["tiers"])
        computing = live["headline"]["prefill_tokens_per_second"]
        yield Finding(
            "tier_slower_than_computing",
            "what is stored is not fetched, because computing it again is faster",
            f"{refused:,} fetches refused; measured: {rates}; prompts at {computing:,.0f} tokens/s",
            "a faster disk, a stronger --kv-compress, or no slow tier at all",
        )
    for tier in live["tiers"]:
        if tier["errors"]:
            yield Finding(
                "tier_errors",
                f"the {tier['name']} tier fails or had damaged blocks",
                f"{tier['errors']:,} errors and damaged blocks since start",
                "look at the disk and the server's log; pasture cache verify DIR",
            )
        asked = tier["hit_tokens"] + tier["missed_tokens"]
        found = tier["hit_tokens"] / max(1, asked)
        if tier["evicted_blocks"] > max(tier["blocks"], 64) and found < 0.5:
            yield Finding(
                "tier_too_small",
                f"the {tier['name']} tier drops conversations before people come back to them",
                f"{tier['evicted_blocks']:,} blocks dropped, {tier['blocks']:,} kept; found {found:.0%} of tokens",
                "a larger --kv-ram" if tier["name"] == "ram" else "a larger --kv-disk",
            )
