"""What a running server's own numbers say is wrong. Reads what its public routes answer (`/v1/live/now`, `/v1/diagnosis`,
`/props`, `/apply-template`); asks nobody itself.

Most counters run since the start, and what went wrong once last week is not wrong now. So troubles are counted twice, some
seconds apart: they are told where they grow meanwhile, or are more than one in a hundred of all there was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pasture.core.storage import BLOCK_TOKENS
from pasture.observe.findings import Finding

Json = Mapping[str, Any]

_NOTABLE = 0.01
"""share of all: less is an exception"""
_TYPICAL_TOKENS = 1024
"""of a conversation that a tier should pay for"""

_THOUGHT = "a thought of the pasture doctor's"
TEMPLATE_PROBE: Json = {
    "messages": [
        {"role": "user", "content": "How many sheep?"},
        {"role": "assistant", "content": f"<think>{_THOUGHT}</think>\n\nForty."},
        {"role": "user", "content": "And goats?"},
    ]
}
"""what `/apply-template` is asked: does a reply come back as it was generated?"""


def examine_server(live: Json, diagnosis: Json, props: Json | None, before: Json | None = None) -> list[Finding]:
    """Everything that is wrong now, from one server's answers of about the same moment; `props` is None where it is closed.

    `before` is `live` of some seconds ago, where somebody has looked.
    """
    earlier = live if before is None else before
    return [
        *_cluster(live),
        *_diagnosed(diagnosis),
        *(() if props is None else _model(props)),
        *_pool(live, diagnosis),
        *_layout(live),
        *_line(live, earlier),
        *_slower_than_computing(live),
        *_tiers(live, earlier),
    ]


def examine_template(prompt: str, *, turn_ahead: bool) -> list[Finding]:
    """Whether the chat template leaves replies as they were generated; `prompt`: what it makes of TEMPLATE_PROBE.

    With `turn_ahead` it need not: the server computes the next turn's beginning as the template makes it.
    """
    if turn_ahead or _THOUGHT in prompt:
        return []
    return [
        Finding(
            "template_strips_reasoning",
            "the chat template takes reasoning out of earlier replies, so a conversation parts from its own past",
            "<think>...</think> of an earlier reply is not in the prompt that the template makes of it, and turn-ahead is off",
            "--turn-ahead, which computes the next turn's beginning while nobody asks; or a template that keeps it "
            "(--chat-template-file)",
        )
    ]


def _cluster(live: Json) -> Iterator[Finding]:
    """An ingress that no replica is connected to answers nobody."""
    if "cluster" in live and not live["cluster"]["replicas"]:
        yield Finding(
            "no_replica",
            "no server of the cluster is there, so nobody is answered",
            "0 servers are connected",
            "start a replica; where one runs, its log says why it is not connected",
        )


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
    resting = max((tier["blocks"] for tier in live["tiers"]), default=0) * BLOCK_TOKENS  # a slow tier has what RAM has
    # evictions are since the start, so of those not more counts than the pool holds: a pool is doubled at most for them
    wanted = pool["used_cells"] + max(resting, pool["cells"])
    yield Finding(
        "pool_too_small",
        "the live cache is too small for what people come back to",
        f"{evicted:,} tokens were evicted for lack of room since the start, from {pool['cells']:,} cells",
        f"--kv-cells {wanted} as the next step, or more --kv-ram; a request log tells the size that would do "
        "(pasture doctor LOG --kv-cells N)",
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


def _line(live: Json, earlier: Json) -> Iterator[Finding]:
    requests = live["requests"]
    rejected, came = requests["rejected"], requests["rejected"] + requests["submitted"]
    if _lasting(rejected, earlier["requests"]["rejected"], came):
        yield Finding(
            "turned_away",
            "people were turned away because the line was full",
            f"{rejected:,} turned away, {requests['submitted']:,} taken; {requests['waiting']} wait now",
            "the machine is small for the traffic: another one, shorter replies, or a longer line (--max-queue)",
        )


def _slower_than_computing(live: Json) -> Iterator[Finding]:
    """Bringing a conversation back takes longer than computing it, so the cost gate refuses: to read it, or to put it there."""
    refused = {kind: n for kind, n in live["gate"]["refusals"].items() if n}
    computing = live["headline"]["prefill_tokens_per_second"]
    if not refused or not computing:
        return
    n_bytes = _TYPICAL_TOKENS * live["pool"]["cell_bytes"]
    restoring = live["gate"]["restore_bytes_per_second"]
    for tier in live["tiers"]:
        rates = [rate for rate in (tier["bytes_per_second"], restoring if tier["name"] != "ram" else 0) if rate]
        seconds = tier["latency_seconds"] + sum(n_bytes / rate for rate in rates)
        if seconds > _TYPICAL_TOKENS / computing:
            yield Finding(
                "tier_slower_than_computing",
                f"the {tier['name']} tier does not pay: computing a conversation again is faster than bringing it back",
                f"{_TYPICAL_TOKENS:,} tokens: {seconds:.2g} s from there ({tier['bytes_per_second'] / 1e6:,.3g} MB/s), "
                f"{_TYPICAL_TOKENS / computing:.2g} s to compute; refused since the start: "
                + ", ".join(f"{n:,} x {kind}" for kind, n in refused.items()),
                "a faster disk or network, a stronger --kv-compress, or no slow tier at all",
            )


def _tiers(live: Json, earlier: Json) -> Iterator[Finding]:
    errors_before = {tier["name"]: tier["errors"] for tier in earlier["tiers"]}
    for tier in live["tiers"]:
        if _lasting(tier["errors"], errors_before.get(tier["name"], 0), tier["blocks"] + tier["evicted_blocks"]):
            yield Finding(
                "tier_errors",
                f"the {tier['name']} tier fails or had damaged blocks",
                f"{tier['errors']:,} errors and damaged blocks since start; it keeps {tier['blocks']:,} blocks",
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


def _lasting(count: int, before: int, of: int) -> bool:
    """Whether a trouble goes on, or is more than an exception."""
    return count > before or count > _NOTABLE * of
