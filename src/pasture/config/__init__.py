"""Settings: what can be set, where each value comes from, and how a size or a duration is written.

One class, `Settings`, declares every setting once: its type, default, help, and the flags that set it. The command line,
the environment (`PASTURE_*`), the TOML file, `pasture config` and the documentation's tests all read that declaration. The room
knows nothing of engines or servers; `pasture.server` turns settings into theirs.
"""

from pasture.config.settings import Flag, Settings, SettingSpec, setting_specs
from pasture.config.sources import Configuration, Origin, OriginKind, load_configuration, validate_settings
from pasture.config.units import format_bytes, format_seconds, parse_bytes, parse_seconds

__all__ = [
    "Configuration",
    "Flag",
    "Origin",
    "OriginKind",
    "SettingSpec",
    "Settings",
    "format_bytes",
    "format_seconds",
    "load_configuration",
    "parse_bytes",
    "parse_seconds",
    "setting_specs",
    "validate_settings",
]
