"""`pasture warm FILE...`: have a running server compute what many will ask for, before anybody does.

A file is a system prompt or a document (plain text), or holds one conversation a line (`.jsonl`: arrays of messages). Of each,
exactly the tokens that every continuation begins with are computed: two conversations that go on differently are rendered by
the server's own chat template, and what both have in common is the prefix. So it fits whatever the template does around it.
Speaks HTTP alone, and asks for one token a prefix. What becomes of the KV is the server's business: with `--kv-cache` it is
still there after a restart.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pasture.cli.output import err, out, print_json
from pasture.core.errors import ConfigError, PastureError

if TYPE_CHECKING:
    from pasture.bench.client import Endpoint

DEFAULT_URL = "http://127.0.0.1:8080"
Message = dict[str, object]

_CONTINUATIONS = ("A", "7")
"""first words of two users who ask different things"""
_ASK_SECONDS = 30.0


class WarmFailed(PastureError):
    """The server could not be asked, or did not compute a prefix."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """What conversations shall find computed. `name` says where it came from."""

    name: str
    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Warmed:
    """One prefix, in tokens. The last one is always computed: a model must see it to go on."""

    name: str
    tokens: int
    reused: int

    @property
    def computed(self) -> int:
        return self.tokens - self.reused


def warm(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="System prompts or documents; .jsonl: message arrays.", show_default=False),
    ],
    url: Annotated[str, typer.Option("--url", help="The running server.")] = DEFAULT_URL,
    api_key: Annotated[str | None, typer.Option("--api-key", envvar="PASTURE_API_KEY", help="One of its keys.")] = None,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds for each prefix.")] = 600.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compute system prompts and documents into a running server's cache, before anybody waits for them.

    pasture warm handbook.txt
    pasture warm prompts/*.txt conversations.jsonl --url http://127.0.0.1:8080
    """
    from pasture.bench.client import Endpoint

    prefixes = [prefix for file in files for prefix in read_prefixes(file)]
    endpoint = Endpoint.parse(url, api_key)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err(), transient=True) as progress:
        task = progress.add_task("Warming", total=len(prefixes))
        warmed = asyncio.run(warm_all(endpoint, prefixes, timeout, lambda _: progress.advance(task)))
    if as_json:
        rows = [{"name": row.name, "tokens": row.tokens, "computed": row.computed, "reused": row.reused} for row in warmed]
        print_json({"prefixes": rows})
    else:
        out().print(_table(warmed))


def read_prefixes(file: Path) -> list[Prefix]:
    """What a file holds. Raises ConfigError for one that cannot be read or holds nothing to compute."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if file.suffix != ".jsonl":
        if not text.strip():
            raise ConfigError(f"{file} is empty")
        return [Prefix(str(file), ({"role": "system", "content": text},))]
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ConfigError(f"{file} is empty")
    return [Prefix(f"{file}:{number}", _messages(line, f"{file}, line {number}")) for number, line in lines]


async def warm_all(
    endpoint: Endpoint, prefixes: Sequence[Prefix], timeout_seconds: float, on_done: Callable[[Warmed], None]
) -> list[Warmed]:
    """One after the other, so that each finds what those before it share with it. Raises WarmFailed at the first failure."""
    warmed: list[Warmed] = []
    if not prefixes:
        return warmed
    bos = str((await _ask(endpoint, "/props", None, prefixes[0], _ASK_SECONDS)).get("bos_token") or "")
    for prefix in prefixes:
        tokens = await prefix_tokens(endpoint, prefix, bos)
        body = {"prompt": tokens, "max_tokens": 1, "temperature": 0}
        usage = cast(Mapping[str, object], (await _ask(endpoint, "/v1/completions", body, prefix, timeout_seconds))["usage"])
        details = cast(Mapping[str, int], usage.get("prompt_tokens_details") or {})
        warmed.append(Warmed(prefix.name, len(tokens), details.get("cached_tokens", 0)))
        on_done(warmed[-1])
    return warmed


async def prefix_tokens(endpoint: Endpoint, prefix: Prefix, bos: str = "") -> list[int]:
    """Token ids that every continuation begins with; a conversation that ends with a question is its own."""
    if prefix.messages[-1]["role"] == "user":
        return await _rendered(endpoint, prefix, prefix.messages, bos)
    one, other = [
        await _rendered(endpoint, prefix, (*prefix.messages, {"role": "user", "content": text}), bos) for text in _CONTINUATIONS
    ]
    n_common = next((index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    if not n_common:
        raise WarmFailed(f"{prefix.name}: the chat template leaves nothing that two conversations begin with")
    return one[:n_common]


async def _rendered(endpoint: Endpoint, prefix: Prefix, messages: Sequence[Message], bos: str) -> list[int]:
    template = await _ask(endpoint, "/apply-template", {"messages": list(messages)}, prefix, _ASK_SECONDS)
    text = str(template["prompt"])
    has_bos = bool(bos) and text.startswith(bos)  # many templates print it, and one is enough
    body = {"content": text, "add_special": not has_bos, "parse_special": True}
    return cast(list[int], (await _ask(endpoint, "/tokenize", body, prefix, _ASK_SECONDS))["tokens"])


async def _ask(
    endpoint: Endpoint, path: str, body: Mapping[str, object] | None, prefix: Prefix, timeout_seconds: float
) -> Mapping[str, object]:
    from pasture.bench.client import call

    try:
        status, answer = await call(endpoint, path, body, timeout_seconds=timeout_seconds)
    except TimeoutError as error:
        raise WarmFailed(f"{prefix.name}: no answer from {endpoint.url}{path} in {timeout_seconds:g} s") from error
    except OSError as error:
        raise WarmFailed(f"nothing answers at {endpoint.url}: {error}") from error
    if status != 200:
        raise WarmFailed(f"{prefix.name}: {endpoint.url}{path} says {status}: {_reason(answer)}")
    found: Mapping[str, object] = json.loads(answer)
    return found


def _reason(answer: bytes) -> str:
    try:
        return str(json.loads(answer)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.decode(errors="replace")[:200]


def _messages(line: str, place: str) -> tuple[Message, ...]:
    try:
        messages = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place} is not JSON: {error}") from error
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise ConfigError(f"{place} is not an array of messages with a role each")
    return tuple(messages)


def _table(warmed: Sequence[Warmed]) -> Table:
    table = Table(title="Warm", title_justify="left", show_footer=len(warmed) > 1)
    table.add_column("prefix", footer="all")
    for heading, total in (
        ("tokens", sum(row.tokens for row in warmed)),
        ("computed", sum(row.computed for row in warmed)),
        ("reused", sum(row.reused for row in warmed)),
    ):
        table.add_column(heading, footer=f"{total:,}", justify="right")
    for row in warmed:
        table.add_row(row.name, f"{row.tokens:,}", f"{row.computed:,}", f"{row.reused:,}")
    return table
