"""Where settings come from, and which source won: flag > environment > file > default.

The file is the one named by `--config` (or `PASTURE_CONFIG`), else `pasture.toml` in the working directory, else
`$XDG_CONFIG_HOME/pasture/pasture.toml` (`~/.config` where that is unset). Everything a person got wrong raises ConfigError
with the name they used: the flag, the variable, or the key and its file. Reads the environment and at most one file; changes
nothing.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pydantic import ValidationError
from pydantic_settings import EnvSettingsSource, TomlConfigSettingsSource

from pasture.config.settings import Settings, SettingSpec, setting_specs
from pasture.core.errors import ConfigError

FILE_NAME = "pasture.toml"
CONFIG_VARIABLE = "PASTURE_CONFIG"

_EXCLUSIVE = (("kv_cells", "kv_memory"), ("chat_template", "chat_template_file"))
"""Two spellings of one thing: the one from the stronger source wins; both from one source is an error."""


class OriginKind(StrEnum):
    """The kinds of source, strongest first."""

    FLAG = "flag"
    ENVIRONMENT = "environment"
    FILE = "file"
    DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where one value came from: `where` is the flag, the variable or the file's path; empty for a default."""

    kind: OriginKind
    where: str = ""

    def __str__(self) -> str:
        return self.where or self.kind.value


@dataclass(frozen=True, slots=True)
class Configuration:
    """Settings and each value's origin."""

    settings: Settings
    origins: Mapping[str, Origin]
    file: Path | None
    """the TOML file that was read"""


def load_configuration(flags: Mapping[str, object] | None = None, *, config_file: Path | None = None) -> Configuration:
    """Merge every source.

    `flags` are the settings given on the command line, by name; values may be text.
    Raises ConfigError when a source cannot be read, names an unknown setting, or has a value that cannot be used.
    """
    specs = setting_specs()
    file = _find_file(config_file)
    layers = (
        (OriginKind.FLAG, _known(flags or {}, "")),
        (OriginKind.ENVIRONMENT, EnvSettingsSource(Settings)()),
        (OriginKind.FILE, {} if file is None else _read_file(file)),
    )
    values: dict[str, object] = {}
    origins: dict[str, Origin] = {}
    for kind, layer in layers:
        overruled = {loser for pair in _EXCLUSIVE for loser in pair if set(pair) & values.keys()}
        for name, value in layer.items():
            if name not in values and name not in overruled:
                values[name] = value
                origins[name] = Origin(kind, _where(kind, specs[name], value, file))
    return Configuration(
        _validated(values, origins), {name: origins.get(name, Origin(OriginKind.DEFAULT)) for name in specs}, file
    )


def validate_settings(values: Mapping[str, object]) -> Settings:
    """Settings of these values and the defaults alone. Raises ConfigError as `load_configuration` does."""
    known = _known(values, "")
    return _validated(known, {name: Origin(OriginKind.FLAG, name) for name in known})


def _validated(values: Mapping[str, object], origins: Mapping[str, Origin]) -> Settings:
    try:
        return Settings(**values)  # type: ignore[arg-type]  # the values are as people wrote them: this checks them
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error, origins))) from None


def _where(kind: OriginKind, spec: SettingSpec, value: object, file: Path | None) -> str:
    if kind is OriginKind.FLAG:
        return spec.flag.off if value is False and spec.flag.off else spec.long_flag
    return spec.env_name if kind is OriginKind.ENVIRONMENT else str(file)


def _find_file(named: Path | None) -> Path | None:
    if named is None and (variable := os.environ.get(CONFIG_VARIABLE)):
        named = Path(variable)
    if named is not None:
        if not named.is_file():
            raise ConfigError(f"{named}: there is no such configuration file")
        return named
    user_directory = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return next((path for path in (Path(FILE_NAME), user_directory / "pasture" / FILE_NAME) if path.is_file()), None)


def _read_file(file: Path) -> dict[str, object]:
    try:
        found = TomlConfigSettingsSource(Settings, file).toml_data
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    return _known({key.replace("-", "_"): value for key, value in found.items()}, f"{file}: ")


def _known(layer: Mapping[str, object], prefix: str) -> dict[str, object]:
    for name in layer:
        if name not in setting_specs():
            close = difflib.get_close_matches(name, setting_specs(), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{prefix}there is no setting {name}{hint}")
    return dict(layer)


def _explain(error: ValidationError, origins: Mapping[str, Origin]) -> list[str]:
    lines = []
    for problem in error.errors():
        message = problem["msg"].removeprefix("Value error, ")
        name = str(problem["loc"][0]) if problem["loc"] else ""
        if origin := origins.get(name):
            subject = f"{name} in {origin.where}" if origin.kind is OriginKind.FILE else origin.where
            lines.append(f"{subject}: {message[:1].lower()}{message[1:]}")
        else:
            lines.append(message)
    return lines
