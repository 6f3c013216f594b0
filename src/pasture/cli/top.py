"""`pasture top`: the dashboard's numbers in a terminal. Asks a running server for `/v1/live/now`, and knows nothing else of it.

Drawn with rich, which every command prints with already: there is nothing to click, so a terminal framework has nothing to add.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pasture.cli.output import err, out, print_json
from pasture.config import format_bytes, format_seconds
from pasture.core.errors import PastureError

if TYPE_CHECKING:
    from pasture.bench.client import Endpoint

DEFAULT_URL = "http://127.0.0.1:8080"
_ASK_SECONDS = 10.0
_BARS = " ▁▂▃▄▅▆▇█"
_STRIP_CHARACTERS = 72

Json = Mapping[str, Any]


class NoNumbers(PastureError):
    """The server could not be asked, or is none of pasture's."""


def top(
    url: Annotated[str, typer.Argument(metavar="[URL]", help="The running server.")] = DEFAULT_URL,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="PASTURE_API_KEY", help="A key of it; the admin key where it has one.")
    ] = None,
    interval: Annotated[float, typer.Option("--interval", min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one look and leave.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one look as JSON and leave.")] = False,
) -> None:
    """Watch a running server: who is there, what sharing saves, where conversations are. Ctrl-C leaves.

    pasture top
    pasture top http://127.0.0.1:8080 --once
    """
    from pasture.bench.client import Endpoint

    endpoint = Endpoint.parse(url, api_key)
    snapshot = look(endpoint)
    if once or as_json:
        time.sleep(interval)  # rates are between two looks
        snapshot = look(endpoint)
    history: deque[float] = deque([snapshot["rates"]["generated"]], maxlen=_STRIP_CHARACTERS)
    if as_json:
        print_json(snapshot)
        return
    if once:
        out().print(picture(snapshot, history, endpoint.url))
        return
    try:
        with Live(
            picture(snapshot, history, endpoint.url), console=out(), screen=out().is_terminal, auto_refresh=False
        ) as live:
            while True:
                time.sleep(interval)
                snapshot = look(endpoint)
                history.append(snapshot["rates"]["generated"])
                live.update(picture(snapshot, history, endpoint.url), refresh=True)
    except KeyboardInterrupt:
        err().print()


def look(endpoint: Endpoint) -> Json:
    """One snapshot. Raises NoNumbers with what is in the way."""
    from pasture.bench.client import call

    try:
        status, answer = asyncio.run(call(endpoint, "/v1/live/now", timeout_seconds=_ASK_SECONDS))
    except TimeoutError as error:
        raise NoNumbers(f"{endpoint.url} did not answer within {_ASK_SECONDS:g} s") from error
    except OSError as error:
        raise NoNumbers(f"{endpoint.url} cannot be reached: {error}") from error
    if status == 401:
        raise NoNumbers(f"{endpoint.url} shows its numbers to those who have its key: --api-key")
    try:
        snapshot = json.loads(answer)
    except ValueError:
        snapshot = None
    if status != 200 or not isinstance(snapshot, dict) or "headline" not in snapshot:
        raise NoNumbers(f"{endpoint.url} has no live numbers (HTTP {status}): is it a pasture server?")
    return snapshot


def picture(snapshot: Json, history: Sequence[float], url: str) -> RenderableType:
    """All of it, for a terminal of 80 columns or more."""
    state = " [yellow]draining[/]" if snapshot["draining"] else ""
    title = Text.from_markup("[bold]pasture[/] ")
    title.append(f"{snapshot['model']} at {url}, up {format_seconds(round(snapshot['uptime_seconds']))}", style="dim")
    title.append_text(Text.from_markup(state))
    parts = (_now(snapshot, history), Text(), _pool(snapshot), _tiers(snapshot), _prefixes(snapshot), _happenings(snapshot))
    return Group(title, Text(), _headline(snapshot), Text(), *parts)


def _headline(snapshot: Json) -> Text:
    headline = snapshot["headline"]
    share = _percent(headline["reused_tokens"], headline["prompt_tokens"])
    saved = headline["saved_seconds"]
    text = Text()
    text.append(f"{headline['reused_tokens']:,}", style="bold yellow")
    text.append(f" prompt tokens reused ({share})   ")
    text.append(f"{headline['computed_tokens']:,}", style="bold")
    text.append(" computed   ")
    text.append("–" if saved is None else format_seconds(round(saved)), style="bold green")
    text.append(" of computing saved")
    return text


def _now(snapshot: Json, history: Sequence[float]) -> Table:
    requests, rates, latency = snapshot["requests"], snapshot["rates"], snapshot["latency"]
    states = {"decoding": "replying", "prefilling": "reading", "waiting": "waiting", "swapped": "swapped out"}
    now = ", ".join(f"{requests[state]} {word}" for state, word in states.items())
    table = Table.grid(padding=(0, 2))
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
        end = round(upto / cells * _STRIP_CHARACTERS)
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
    return ", ".join(f"{name} {_short(percentiles[name])}" for name in ("p50", "p95", "p99"))


def _short(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _spark(values: Sequence[float]) -> str:
    most = max([*values, 1e-9])
    return "".join(_BARS[round(value / most * (len(_BARS) - 1))] for value in values)


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "–"
