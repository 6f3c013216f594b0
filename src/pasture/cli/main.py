"""The `pasture` command: its groups, its help, and how a run ends.

Exit codes: 0 done, 1 it could not be done (one line on stderr says why), 2 the command line or a setting is wrong. A
traceback is a bug of pasture's, never a user's mistake.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from pasture import __version__
from pasture.cli.bench import bench, demo
from pasture.cli.cache import cache
from pasture.cli.check import check
from pasture.cli.cluster import cluster
from pasture.cli.configuration import config
from pasture.cli.doctor import doctor
from pasture.cli.flags import normalise
from pasture.cli.keys import keys
from pasture.cli.output import report
from pasture.cli.public import public
from pasture.cli.serve import serve
from pasture.cli.simulate import simulate_command
from pasture.cli.top import top
from pasture.cli.warm import warm
from pasture.core.errors import PastureError

app = typer.Typer(
    name="pasture",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start here: pasture demo needs no model of yours. With one: pasture serve -m model.gguf, then open the URL that it "
    "prints, or point any OpenAI client at it.",
)
app.command(rich_help_panel="Serve")(serve)
app.command(rich_help_panel="Serve")(warm)
app.command(rich_help_panel="Measure")(demo)
app.command(rich_help_panel="Measure")(bench)
app.command(rich_help_panel="Find out")(top)
app.command("simulate", rich_help_panel="Measure")(simulate_command)
app.command(rich_help_panel="Find out")(doctor)
app.command(rich_help_panel="Find out")(check)
app.command(rich_help_panel="Find out")(config)
app.add_typer(cache, name="cache", rich_help_panel="Look after")
app.add_typer(keys, name="keys", rich_help_panel="Look after")
app.add_typer(cluster, name="cluster", rich_help_panel="Serve")
app.add_typer(public, name="public", rich_help_panel="Look after")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pasture {__version__}")
        raise typer.Exit


@app.callback()
def pasture(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Serve a whole team from one llama.cpp model, on one shared KV cache."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends the process with the exit code."""
    try:
        app(args=normalise(sys.argv[1:] if arguments is None else arguments))
    except PastureError as error:
        sys.exit(report(error))
