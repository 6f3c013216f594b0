"""`pasture config`: every setting, its value, and where the value came from."""

from __future__ import annotations

import re
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from pasture.cli.flags import with_settings
from pasture.cli.output import out, print_json
from pasture.config import Configuration, Flag, OriginKind, SettingSpec, format_bytes, format_seconds, setting_specs

_PASSWORD = re.compile(r"(://[^/:]*:)[^/]*@")
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
            "value": _without_secrets(value, spec.flag),
            "origin": origin.kind.value,
            "where": origin.where or None,
        }
    return {"file": str(configuration.file) if configuration.file else None, "settings": rows}


def _without_secrets(value: object, flag: Flag) -> object:
    """As it may be printed: of a secret that it is set, of a URL all but its password."""
    if isinstance(value, str) and "://" in value:
        return _PASSWORD.sub(r"\1***@", value)
    if flag.secret and isinstance(value, tuple):
        return ["***" for _ in value]
    return "***" if flag.secret and value is not None else value


def _shown(configuration: Configuration, spec: SettingSpec) -> Text:
    setting = getattr(configuration.settings, spec.name)
    value = _without_secrets(setting, spec.flag)
    if value in (None, (), []):
        return Text("unset", "dim")
    if isinstance(value, list):
        return Text(f"{len(value)} set, not shown")
    if value == "***":
        return Text("set, not shown")
    if spec.flag.metavar == "SIZE":
        return Text(format_bytes(setting))
    if spec.flag.metavar == "TIME":
        return Text(format_seconds(setting))
    if isinstance(value, bool):
        return Text("on" if value else "off")
    return Text(str(value))
