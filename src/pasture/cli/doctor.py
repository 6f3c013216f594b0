"""`pasture doctor [URL|LOG]`: what is wrong with a running server, or with the requests in a log, and what to change.

Exit code 0: nothing found; 3: something found; 1 and 2 as everywhere. Asks a server's public routes only, the numbers twice:
what grows meanwhile is wrong now.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from pasture.cli.output import out, print_json
from pasture.core.errors import ConfigError, PastureError
from pasture.observe import (
    TEMPLATE_PROBE,
    Finding,
    examine_server,
    examine_template,
    examine_traffic,
    pool_too_small,
    read_log,
)

if TYPE_CHECKING:
    from pasture.bench.client import Endpoint

FOUND = 3
DEFAULT_URL = "http://127.0.0.1:8080"
WATCH_SECONDS = 3.0
_ASK_SECONDS = 30.0


class NotExamined(PastureError):
    """The server could not be asked, or is none of pasture's."""


@dataclass(frozen=True, slots=True)
class Examination:
    """What was found, in how much, and what there was no looking at."""

    findings: list[Finding]
    seen: str
    unseen: tuple[str, ...] = ()


def doctor(
    target: Annotated[
        str, typer.Argument(metavar="[URL|LOG]", help="A running server, or a request log (JSON lines).")
    ] = DEFAULT_URL,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="PASTURE_API_KEY", help="A key of it; the admin key where it has one.")
    ] = None,
    kv_cells: Annotated[
        int | None, typer.Option("--kv-cells", help="For a log: also whether a pool of so many cells would do.")
    ] = None,
    watch: Annotated[
        float, typer.Option("--watch", min=0.0, help="Of a server: seconds between two looks at its counters.")
    ] = WATCH_SECONDS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Say what is wrong and what to change, in plain words, with evidence. Exit code 3 when something was found.

    pasture doctor
    pasture doctor requests.jsonl --kv-cells 32768 --json
    """
    if target.startswith(("http://", "https://")):
        from pasture.bench.client import Endpoint

        examined = examine(Endpoint.parse(target, api_key), watch)
    else:
        examined = examine_log(Path(target), kv_cells)
    if as_json:
        print_json({"ok": not examined.findings, **asdict(examined)})
    else:
        out().print(told(examined), highlight=False)
    if examined.findings:
        raise typer.Exit(FOUND)


def examine_log(file: Path, kv_cells: int | None = None) -> Examination:
    """What is wrong with a log's requests. Raises ConfigError for a file that is none."""
    try:
        with file.open(encoding="utf-8") as lines:
            requests = read_log(lines)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    findings = examine_traffic(requests)
    if kv_cells is not None and (small := pool_too_small(requests, kv_cells)) is not None:
        findings.append(small)
    return Examination(findings, f"{len(requests):,} requests in {file}")


def examine(endpoint: Endpoint, watch_seconds: float = WATCH_SECONDS) -> Examination:
    """What a running server's numbers say. Raises NotExamined."""
    return asyncio.run(_examine(endpoint, watch_seconds))


async def _examine(endpoint: Endpoint, watch_seconds: float) -> Examination:
    from pasture.bench.client import call_json

    before = await _ask(endpoint, "/v1/live/now")
    await asyncio.sleep(watch_seconds)
    live, diagnosis = await _ask(endpoint, "/v1/live/now"), await _ask(endpoint, "/v1/diagnosis")
    # not all of it opens to one key, nor on one port: templates are an API key's, and not the admin port's
    props = await call_json(endpoint, "/props", timeout_seconds=_ASK_SECONDS)
    applied = await call_json(endpoint, "/apply-template", TEMPLATE_PROBE, timeout_seconds=_ASK_SECONDS)
    findings = examine_server(live, diagnosis, props, before)
    if props is not None and applied is not None:
        findings += examine_template(str(applied["prompt"]), turn_ahead=bool(props["turn_ahead"]))
    asked = {"the model's properties (/props)": props, "the chat template (/apply-template)": applied}
    unseen = tuple(what for what, answer in asked.items() if answer is None)
    seen = f"{endpoint.url}, {live['headline']['prompt_tokens']:,} prompt tokens since it started"
    return Examination(findings, seen, unseen)


async def _ask(endpoint: Endpoint, path: str) -> Mapping[str, Any]:
    from pasture.bench.client import call

    try:
        status, answer = await call(endpoint, path, timeout_seconds=_ASK_SECONDS)
    except TimeoutError as error:
        raise NotExamined(f"{endpoint.url} did not answer within {_ASK_SECONDS:g} s") from error
    except OSError as error:
        raise NotExamined(f"{endpoint.url} cannot be reached: {error}") from error
    if status == 401:
        raise NotExamined(f"{endpoint.url} shows its numbers to those who have its key: --api-key")
    try:
        found = json.loads(answer)
    except ValueError:
        found = None
    if status != 200 or not isinstance(found, dict):
        raise NotExamined(f"{endpoint.url}{path} answered {status}: is it a pasture server?")
    return found


def told(examined: Examination) -> str:
    """An examination for a person, as rich markup."""
    seen = escape(examined.seen)
    lines = [f"[bold]{len(examined.findings)} found[/] in {seen}:"]
    if not examined.findings:
        lines = [f"[green]Nothing wrong found[/] in {seen}."]
    for finding in examined.findings:
        lines += [
            "",
            f"[yellow]{escape(finding.message)}[/]  [dim]{finding.name}[/]",
            f"  seen: {escape(finding.evidence)}",
            f"  change: {escape(finding.advice)}",
        ]
    if examined.unseen:
        lines += ["", f"Not looked at, because it does not open to this key or on this port: {', '.join(examined.unseen)}."]
    return "\n".join(lines)
