"""`pasture config`: every setting, its value, and where the value came from."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from pasture.cli.flags import with_settings
from pasture.cli.output import out, print_json
from pasture.config import Configuration, OriginKind, SettingSpec, format_bytes, format_seconds, setting_specs

_STYLES = {OriginKind.FLAG: "bold cyan", OriginKind.ENVIRONMENT: "bold magenta", OriginKind.FILE: "bold green"}


@with_settings()
def config(
    configuration: Configuration,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show every setting, its value, and where the value came from.

    Takes the same flags as `serve`, so you can see what a command line would do:

        pasture config -m model.gguf --kv-memory 2GiB
    """
    if as_json:
        print_json(_as_json(configuration))
        return
    table = Table(title="Settings", title_justify="left", caption=_caption(configuration), caption_justify="left")
    table.add_column("setting", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("from", overflow="fold")
    table.add_column("environment", style="dim", no_wrap=True)
    group = ""
    for spec in setting_specs().values():
        if spec.flag.hidden:
            continue
        if spec.flag.group != group:
            group = spec.flag.group
            table.add_section()
        origin = configuration.origins[spec.name]
        style = _STYLES.get(origin.kind, "dim")
        table.add_row(spec.name, _shown(configuration, spec), Text(str(origin), style), spec.env_name)
    out().print(table)


def _caption(configuration: Configuration) -> str:
    read = f"File read: {configuration.file}." if configuration.file else "No configuration file was found."
    return f"{read} A flag beats the environment, which beats the file."


def _as_json(configuration: Configuration) -> dict[str, object]:
    rows: dict[str, object] = {}
    for spec in setting_specs().values():
        value = getattr(configuration.settings, spec.name)
        origin = configuration.origins[spec.name]
        rows[spec.name] = {
            "value": _hidden(value) if spec.flag.secret else value,
            "origin": origin.kind.value,
            "where": origin.where or None,
        }
    return {"file": str(configuration.file) if configuration.file else None, "settings": rows}


def _hidden(value: object) -> object:
    return ["***" for _ in value] if isinstance(value, tuple) else value


def _shown(configuration: Configuration, spec: SettingSpec) -> Text:
    value = getattr(configuration.settings, spec.name)
    if value is None or value == ():
        return Text("unset", "dim")
    if spec.flag.secret:
        return Text(f"{len(value)} set, not shown")
    if spec.flag.metavar == "SIZE":
        return Text(format_bytes(value))
    if spec.flag.metavar == "TIME":
        return Text(format_seconds(value))
    if isinstance(value, bool):
        return Text("on" if value else "off")
    return Text(str(value))
