"""`pasture public add|ls|rm`: texts that the operator declares to be no secret, for everybody's prompts to share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from pasture.cli.keys import AsJson, StateOption, opened_state
from pasture.cli.output import out, print_json
from pasture.config import format_bytes
from pasture.core.errors import ConfigError

public = typer.Typer(no_args_is_help=True, help="Prefixes that every tenant's prompts may share.")


@public.command("add")
def add(
    file: Annotated[Path, typer.Argument(help="The text.", show_default=False)],
    name: Annotated[str | None, typer.Option("--name", help="What to call it; the file's name unless given.")] = None,
    role: Annotated[
        str, typer.Option("--role", help="Whose message it is; `none` where the text is what the model reads, tags and all.")
    ] = "system",
    state: StateOption = None,
) -> None:
    """Declare the beginning of everybody's prompts to be no secret: a system prompt, a document in one."""
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    with opened_state(state) as opened:
        opened.public.add(name or file.stem, content, None if role == "none" else role)


@public.command("ls")
def ls(state: StateOption = None, as_json: AsJson = False) -> None:
    """List the declared prefixes."""
    with opened_state(state) as opened:
        found = opened.public.all()
    if as_json:
        print_json({"public": [{"name": one.name, "bytes": len(one.content.encode())} for one in found]})
        return
    table = Table(title="Public prefixes", title_justify="left")
    table.add_column("name", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    for one in found:
        table.add_row(one.name, format_bytes(len(one.content.encode())))
    out().print(table)


@public.command("rm")
def rm(name: Annotated[str, typer.Argument(help="As `ls` shows it.", show_default=False)], state: StateOption = None) -> None:
    """Withdraw a prefix; what is cached of it goes in time."""
    with opened_state(state) as opened:
        opened.public.remove(name)
