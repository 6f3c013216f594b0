"""`pasture serve`: load the model, say what there is, serve until told to end."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn

from pasture.cli.flags import with_settings
from pasture.cli.output import err, remarks, set_up_logging, weights
from pasture.cli.warm import Prefix, read_prefixes, warm_all
from pasture.config import Configuration, Settings, format_bytes, format_seconds
from pasture.core.errors import PastureError
from pasture.core.ports import Service
from pasture.core.storage import StoreStatistics, TierStatistics

log = logging.getLogger(__name__)

WARM_SECONDS = 3600.0
"""for one prefix of --warm"""
TYPICAL_TOKENS = 4096
"""the conversation length at which the banner counts users"""


@with_settings()
def serve(
    configuration: Configuration,
    warm: Annotated[
        list[Path] | None,
        typer.Option("--warm", metavar="FILE", help="Compute this first, as `pasture warm` does.", rich_help_panel="Server"),
    ] = None,
) -> None:
    """Serve a model to everybody, behind an OpenAI-compatible API.

        pasture serve -m model.gguf
        pasture serve -m model.gguf --kv-memory 2GiB --host 0.0.0.0 --api-key secret

    Every setting can also be written in the environment or in a file: see `pasture config`.
    """
    from pasture.server import serve as serve_forever  # loads libllama and the web framework: not before they are needed

    settings = configuration.settings
    prefixes = [prefix for file in warm or () for prefix in read_prefixes(file)]
    set_up_logging(settings.log_level, settings.log_format)
    bar = Progress("[dim]{task.description}", BarColumn(), TaskProgressColumn(), console=err())
    loading = bar.add_task(escape(f"Loading {Path(settings.model or 'the model').name}"), total=1.0)
    with remarks() as found, bar:

        def on_started(url: str, service: Service) -> None:
            bar.update(loading, completed=1.0)
            bar.stop()
            err().print(banner(url, service, settings, found), highlight=False)
            if prefixes:
                threading.Thread(target=_warm, args=(url, settings, prefixes), name="pasture-warm", daemon=True).start()

        serve_forever(settings, on_started, lambda share: bar.update(loading, completed=share))


def _warm(url: str, settings: Settings, prefixes: Sequence[Prefix]) -> None:
    """A client of this server like any other, in a thread of its own; what goes wrong is said and nothing more."""
    from pasture.bench.client import Endpoint

    key = settings.api_key[0] if settings.api_key else None
    try:
        warmed = asyncio.run(warm_all(Endpoint.parse(_local(url), key), prefixes, WARM_SECONDS, lambda _: None))
    except PastureError as error:
        log.warning("--warm: %s", error)
        return
    computed, reused = sum(row.computed for row in warmed), sum(row.reused for row in warmed)
    err().print(f"  [dim]warm    [/] {len(warmed)} prefixes: {computed:,} tokens computed, {reused:,} found", highlight=False)


def banner(url: str, service: Service, settings: Settings, remarks: Sequence[str] = ()) -> str:
    """What a person who just started the server wants to know, as rich markup."""
    model, shape = service.model, service.statistics().pool.shape
    url = _local(url)
    size = f", {format_bytes(shape.n_cells * model.cell_bytes)}" if model.cell_bytes else ""
    layout = f"{shape.layout.value} now, follows the traffic" if settings.kv_layout == "auto" else shape.layout.value
    rows = {
        "model": escape(f"{settings.alias or model.name}, {model.description}"),
        "weights": weights(model),
        "pool": f"{shape.n_cells:,} tokens{size}; {format_bytes(model.cell_bytes)} a token"
        if size
        else f"{shape.n_cells:,} tokens",
        "users": _users(shape.n_cells, settings),
        "layout": layout,
        "sharing": "on" if settings.share_prefix and model.shareable else _why_not(settings),
        "resting": escape(resting(service.statistics().store, settings)),
    }
    lines = [f"[bold]pasture[/] serves at [bold cyan]{url}/v1[/]"]
    lines += [f"  [dim]{name:<8}[/] {text}" for name, text in rows.items()]
    lines += [f"  [yellow]{escape(remark)}[/]" for remark in remarks]
    if not (settings.api_key or settings.api_key_file) and settings.host not in ("127.0.0.1", "localhost", "::1"):
        lines.append("  [yellow]open to everybody who can reach this machine: set --api-key[/]")
    return "\n".join(lines)


def _local(url: str) -> str:
    return url.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")


def _users(n_cells: int, settings: Settings) -> str:
    half = TYPICAL_TOKENS // 2
    alone, sharing = n_cells // TYPICAL_TOKENS, min(settings.max_running, max(0, n_cells - half) // half)
    if alone < 2:
        return f"one conversation of up to {n_cells:,} tokens, or several short ones; -c or --kv-memory for more"
    return f"{alone} conversations of {TYPICAL_TOKENS:,} tokens, or {sharing} with half of each in common"


def resting(store: StoreStatistics, settings: Settings) -> str:
    """Where conversations are that nobody continues at present, and in which form."""
    places = [_place(tier, settings) for tier in store.tiers if tier.budget_bytes or tier.remote is not None]
    if not places:
        return "nowhere: what leaves the live cache is computed again"
    forms = {"auto": "smaller forms when RAM is short", "off": "as computed"}
    form = forms.get(settings.kv_compress, f"all as {settings.kv_compress}")
    return f"after {format_seconds(settings.idle_live)} in {', then '.join(places)}; {form}"


def _place(tier: TierStatistics, settings: Settings) -> str:
    size = format_bytes(tier.budget_bytes)
    if tier.name == "ram":
        return f"{size} of RAM"
    encrypted = ", encrypted" if settings.kv_key_file is not None else ""
    if tier.remote is not None:
        servers = ", ".join(server.address for server in tier.remote.servers)
        return f"{tier.remote.kind} over {tier.remote.transport} ({servers}{encrypted})"
    return f"{size} of {tier.name} ({settings.kv_cache}{encrypted})"


def _why_not(settings: Settings) -> str:
    if not settings.share_prefix:
        return "off (--no-share-prefix)"
    return "whole conversations only: this model (or flash attention being off) does not allow parts to be shared"
