"""The settings as command-line options, generated from their declaration.

A command asks for a `configuration: Configuration`; `with_settings` gives it one option for each setting, and `--config`.
Every option arrives as the text that was typed and is validated where all sources are, so a wrong value reads the same
wherever it was written.

llama.cpp's short options have several letters (`-ngl 99`, `-ctk q8_0`). The parser matches those as whole words before it
tries single letters, so they work like llama.cpp's, as does `-c8192`. Only `-fa`, which llama.cpp accepts with and without a
value, needs help: `normalise` adds the missing `on`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated

import typer

from pasture.config import Configuration, SettingSpec, load_configuration, setting_specs

_FLASH_ATTENTION_VALUES = {"on", "off", "auto", "1", "0", "-1", "true", "false", "yes", "no"}

CONFIG_OPTION = typer.Option(
    "--config",
    metavar="FILE",
    help="Read settings from this TOML file; ./pasture.toml or the user's own unless given.",
    rich_help_panel="Settings",
)


def normalise(arguments: Sequence[str]) -> list[str]:
    """The arguments with `on` put behind a `-fa` or `--flash-attn` that stands alone."""
    result: list[str] = []
    for index, argument in enumerate(arguments):
        result.append(argument)
        if argument in ("-fa", "--flash-attn"):
            following = arguments[index + 1] if index + 1 < len(arguments) else ""
            if following.lower() not in _FLASH_ATTENTION_VALUES:
                result.append("on")
    return result


def with_settings(*, without: Collection[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace the command's `configuration` parameter by an option for each setting but `without`."""
    specs = [spec for name, spec in setting_specs().items() if name not in without]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(*, config: Path | None = None, **arguments: object) -> None:
            typed = {spec.name: arguments.pop(spec.name, None) for spec in specs}
            flags = {name: value for name, value in typed.items() if value is not None}
            command(configuration=load_configuration(flags, config_file=config), **arguments)

        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.annotation is not Configuration
        ]
        parameters = [*own, *(_parameter(spec) for spec in specs), _config_parameter()]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads the options from
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _config_parameter() -> inspect.Parameter:
    return inspect.Parameter(
        "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, CONFIG_OPTION]
    )


def _parameter(spec: SettingSpec) -> inspect.Parameter:
    flag = spec.flag
    names = (f"{flag.names[0]}/{flag.off}",) if flag.off else flag.names
    option = typer.Option(
        *names,
        help=spec.help,
        metavar=None if spec.is_switch else flag.metavar,
        show_default=_shown_default(spec),
        rich_help_panel=flag.group,
        hidden=flag.hidden,
    )
    annotation = Annotated[bool | None, option] if spec.is_switch else Annotated[str | None, option]
    return inspect.Parameter(spec.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _shown_default(spec: SettingSpec) -> str | bool:
    if spec.default is None or spec.default == ():
        return False
    if isinstance(spec.default, bool):
        return "on" if spec.default else "off"
    return f"{spec.default:g}" if isinstance(spec.default, float) else str(spec.default)
