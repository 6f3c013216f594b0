"""What `pasture top` draws of a snapshot, as rich renderables. Pure; numbers as `/v1/live/now` gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pasture.config import format_bytes

STRIP_CHARACTERS = 72
_BARS = " ▁▂▃▄▅▆▇█"

Json = Mapping[str, Any]


def picture(snapshot: Json, history: Sequence[float], url: str) -> RenderableType:
    """All of it, for a terminal of 80 columns or more."""
    rest = (_tiers(snapshot), _prefixes(snapshot), _happenings(snapshot))
    return Group(title(snapshot, url), Text(), overview(snapshot, history), *rest)


def title(snapshot: Json, url: str, remark: str = "") -> Text:
    """One line: which model, where, since when."""
    text = Text("pasture ", style="bold")
    text.append(f"{snapshot['model']} at {url}, up {_lasting(snapshot['uptime_seconds'])}", style="not bold dim")
    if snapshot["draining"]:
        text.append(" draining", style="yellow")
    if remark:
        text.append(f" {remark}", style="yellow")
    return text


def overview(snapshot: Json, history: Sequence[float]) -> RenderableType:
    """What sharing saves, who is there, how fast it is, and the live cache."""
    return Group(_headline(snapshot), Text(), _now(snapshot, history), Text(), _pool(snapshot))


def _headline(snapshot: Json) -> Text:
    headline = snapshot["headline"]
    share = _percent(headline["reused_tokens"], headline["prompt_tokens"])
    saved = headline["saved_seconds"]
    text = Text()
    text.append(f"{headline['reused_tokens']:,}", style="bold yellow")
    text.append(f" prompt tokens reused ({share})   ")
    text.append(f"{headline['computed_tokens']:,}", style="bold")
    text.append(" computed   ")
    text.append("–" if saved is None else _lasting(saved), style="bold green")
    text.append(" of computing saved")
    return text


def _now(snapshot: Json, history: Sequence[float]) -> Table:
    requests, rates, latency = snapshot["requests"], snapshot["rates"], snapshot["latency"]
    states = {"decoding": "replying", "prefilling": "reading", "waiting": "waiting", "swapped": "swapped out"}
    now = ", ".join(f"{requests[state]} {word}" for state, word in states.items())
    table = Table.grid(padding=(0, 2))
    table.add_row("users", f"{requests['users']:,} now")
    table.add_row("requests", f"{now}; {requests['finished']:,} answered, {requests['rejected']:,} turned away")
    table.add_row("tokens/s", ", ".join(f"{rate:,.0f} {what}" for what, rate in rates.items()))
    table.add_row("", Text(_spark(history), style="green"))
    table.add_row("first token", _spread(latency["first_token"]))
    table.add_row("between tokens", _spread(latency["inter_token"]))
    return _named(table)


def _pool(snapshot: Json) -> Table:
    pool = snapshot["pool"]
    used = f"{_percent(pool['used_cells'], pool['cells'])} of {pool['cells']:,} cells ({format_bytes(pool['bytes'])})"
    sharing = f"{pool['shared_cells']:,} shared, saving {pool['saved_cells']:,}"
    table = Table.grid(padding=(0, 2))
    table.add_row("live cache", _strip(pool))
    table.add_row("", f"{used}; {sharing}; {pool['sequences']} sequences, {pool['layout']}, {pool['form']}")
    return _named(table)


def _strip(pool: Json) -> Text:
    """Shared, own and running, own and idle, free: in this order."""
    shared, running, used, cells = pool["shared_cells"], pool["running_cells"], pool["used_cells"], pool["cells"]
    text = Text()
    drawn = 0
    for upto, character, style in (
        (shared, "█", "yellow"),
        (max(shared, running), "█", "green"),
        (used, "▒", "green"),
        (cells, "·", "dim"),
    ):
        end = round(upto / max(1, cells) * STRIP_CHARACTERS)
        text.append(character * max(0, end - drawn), style=style)
        drawn = max(drawn, end)
    return text


def _tiers(snapshot: Json) -> Table:
    table = Table.grid(padding=(0, 2))
    for tier in snapshot["tiers"]:
        if tier["budget_bytes"]:
            forms = ", ".join(f"{format_bytes(size)} {form}" for form, size in tier["bytes_by_form"].items())
            used = f"{format_bytes(tier['bytes'])} of {format_bytes(tier['budget_bytes'])}, {tier['blocks']:,} blocks"
            table.add_row(tier["name"], used + (f": {forms}" if forms else ""))
        for server in tier["remote"]["servers"] if tier["remote"] else ():
            answers = (
                f"answers in {1e3 * server['round_trip_seconds']:.1f} ms" if server["state"] == "closed" else "does not answer"
            )
            table.add_row(tier["remote"]["kind"], f"{server['address']} {answers}; {tier['hit_tokens']:,} tokens found")
    return _named(table)


def _prefixes(snapshot: Json) -> Table:
    """The stretches that sharing saves most by."""
    shared = sorted((row for row in snapshot["prefixes"] if row[5] > 1), key=lambda row: -row[4] * (row[5] - 1))[:5]
    table = Table.grid(padding=(0, 2))
    for index, (_, _, _, start, tokens, holders, running, *_) in enumerate(shared):
        table.add_row(
            "" if index else "shared most", f"tokens {start:,} to {start + tokens:,}: {holders} hold it, {running} running"
        )
    return _named(table)


def _happenings(snapshot: Json) -> Table:
    table = Table.grid(padding=(0, 2))
    for index, (_, ago, kind, amount, unit, text) in enumerate(snapshot["happenings"][:6]):
        size = format_bytes(amount) if unit == "bytes" else f"{amount:,} {unit}"
        table.add_row("" if index else "happened", Text(f"{kind:<9} {size} {text}, {ago:.0f} s ago"))
    return _named(table)


def _named(table: Table) -> Table:
    if table.columns:
        table.columns[0].style = "dim"
        table.columns[0].min_width = 14
    return table


def _spread(percentiles: Json | None) -> str:
    if percentiles is None:
        return "nobody in the last minute"
    return ", ".join(f"{name} {_lasting(percentiles[name])}" for name in ("p50", "p95", "p99"))


def _lasting(seconds: float) -> str:
    """As the dashboard says it: `250 ms`, `9.1 s`, `9 min 7 s`, `2 h 5 min`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _spark(values: Sequence[float]) -> str:
    most = max([*values, 1e-9])
    return "".join(_BARS[round(value / most * (len(_BARS) - 1))] for value in values)


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "–"
