"""`pasture keys add|ls|revoke|limit`: API keys and the limits of their tenants, whether or not a server is running.

Works on the database that `--state` names, else the one in the settings. A key is shown once, by `add`, alone on stdout; what
is kept of it cannot be turned back into a key. A running server takes up a change within seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from pasture.cli.output import err, out, print_json
from pasture.config import load_configuration, parse_bytes
from pasture.core.errors import ConfigError

if TYPE_CHECKING:
    from pasture.sessions.state import State

StateOption = Annotated[
    str | None, typer.Option("--state", metavar="FILE", help="The server's --state; where settings name one, that one.")
]
_FRACTIONS = ("weight", "guaranteed_share", "idle_seconds", "lifetime_seconds")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

keys = typer.Typer(no_args_is_help=True, help="API keys, and what their tenants may.")


@contextmanager
def opened_state(location: str | None) -> Iterator[State]:
    """The state that a command works on. Raises ConfigError when none is named."""
    from pasture.sessions.state import State  # SQLAlchemy: not before it is needed

    location = location or load_configuration().settings.state
    if location is None:
        raise ConfigError("no state: give --state FILE, or set PASTURE_STATE, or state in pasture.toml")
    with closing(State(location)) as state:
        yield state


@keys.command("add")
def add(
    tenant: Annotated[str, typer.Argument(help="Whose key it is; made when it is new.", show_default=False)],
    label: Annotated[str, typer.Option("--label", help="What the key is for.")] = "",
    state: StateOption = None,
) -> None:
    """Make a key and print it, once. Keys of one tenant share prompts and sessions."""
    with opened_state(state) as opened:
        secret, key = opened.tenants.add_key(tenant, label)
    err().print(f"key {key.key_id} of {tenant}; it is shown this once:", style="dim", markup=False, highlight=False)
    print(secret)


@keys.command("ls")
def ls(state: StateOption = None, as_json: AsJson = False) -> None:
    """List keys (not the keys themselves), revoked ones too, and their tenants' limits."""
    with opened_state(state) as opened:
        found = opened.tenants.all_keys()
        tenants = opened.tenants.all()
    if as_json:
        limits = {tenant.name: asdict(tenant.limits) for tenant in tenants}
        print_json({"keys": [asdict(key) for key in found], "tenants": limits})
        return
    table = Table(title="Keys", title_justify="left")
    for heading in ("id", "tenant", "label", "made", "state"):
        table.add_column(heading, no_wrap=True)
    for key in found:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(key.created))
        table.add_row(key.key_id, key.tenant, key.label, made, "valid" if key.revoked is None else "revoked")
    out().print(table)


@keys.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(help="As `ls` shows it.", show_default=False)], state: StateOption = None
) -> None:
    """Make a key useless. A server that has had keys stays closed without any."""
    with opened_state(state) as opened:
        opened.tenants.revoke(key_id)


@keys.command("limit")
def limit(
    tenant: Annotated[str, typer.Argument(help="Whose limits.", show_default=False)],
    changes: Annotated[list[str], typer.Argument(metavar="NAME=VALUE...", help="`none` takes a limit away.")],
    state: StateOption = None,
) -> None:
    """Change what a tenant may, such as tokens_per_minute=20000 max_live_cells=8000 max_ram_bytes=2GiB weight=2."""
    with opened_state(state) as opened:
        print_json(asdict(opened.tenants.limit(tenant, **dict(_change(change) for change in changes)).limits))


def _change(text: str) -> tuple[str, float | int | None]:
    name, _, value = text.partition("=")
    if value.lower() == "none":
        return name, None
    try:
        if name.endswith("_bytes"):
            return name, parse_bytes(value)
        return name, float(value) if name in _FRACTIONS else int(value)
    except ValueError:
        raise ConfigError(f"{text}: a limit is written name=number") from None
