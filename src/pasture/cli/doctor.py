"""`pasture doctor [URL|LOG]`: what is wrong with a running server, or with the requests in a log, and what to change.

Exit code 0: nothing found; 3: something found; 1 and 2 as everywhere. Asks a server's public routes only.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
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
_ASK_SECONDS = 30.0


class NotExamined(PastureError):
    """The server could not be asked, or is none of pasture's."""


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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Say what is wrong and what to change, in plain words, with evidence. Exit code 3 when something was found.

    pasture doctor
    pasture doctor requests.jsonl --kv-cells 32768 --json
    """
    if target.startswith(("http://", "https://")):
        from pasture.bench.client import Endpoint

        findings, seen = examine(Endpoint.parse(target, api_key))
    else:
        findings, seen = examine_log(Path(target), kv_cells)
    if as_json:
        print_json({"ok": not findings, "seen": seen, "findings": [asdict(finding) for finding in findings]})
    else:
        out().print(told(findings, seen), highlight=False)
    if findings:
        raise typer.Exit(FOUND)


def examine_log(file: Path, kv_cells: int | None = None) -> tuple[list[Finding], str]:
    """What is wrong with a log's requests, and how much was read. Raises ConfigError for a file that is none."""
    try:
        requests = read_log(file.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    findings = examine_traffic(requests)
    if kv_cells is not None and (small := pool_too_small(requests, kv_cells)) is not None:
        findings.append(small)
    return findings, f"{len(requests):,} requests in {file}"


def examine(endpoint: Endpoint) -> tuple[list[Finding], str]:
    """What a running server's numbers say, and how much they stand for. Raises NotExamined."""
    return asyncio.run(_examine(endpoint))


async def _examine(endpoint: Endpoint) -> tuple[list[Finding], str]:
    from pasture.bench.client import call_json

    live, diagnosis = await _ask(endpoint, "/v1/live/now"), await _ask(endpoint, "/v1/diagnosis")
    # templates open to an API key and not to the admin key: what does not open to this key is left out
    props = await call_json(endpoint, "/props", timeout_seconds=_ASK_SECONDS)
    applied = await call_json(endpoint, "/apply-template", TEMPLATE_PROBE, timeout_seconds=_ASK_SECONDS)
    findings = examine_server(live, diagnosis, props)
    if applied is not None:
        findings += examine_template(str(applied["prompt"]))
    return findings, f"{endpoint.url}, {live['headline']['prompt_tokens']:,} prompt tokens since it started"


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


def told(findings: Sequence[Finding], seen: str) -> str:
    """The findings for a person, as rich markup."""
    if not findings:
        return f"[green]Nothing wrong found[/] in {escape(seen)}."
    lines = [f"[bold]{len(findings)} found[/] in {escape(seen)}:"]
    for finding in findings:
        lines += [
            "",
            f"[yellow]{escape(finding.message)}[/]  [dim]{finding.name}[/]",
            f"  seen: {escape(finding.evidence)}",
            f"  change: {escape(finding.advice)}",
        ]
    return "\n".join(lines)
