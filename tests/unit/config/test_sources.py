"""Flag beats environment beats file beats default, every value knows its origin, and mistakes name what was typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from pasture.config import Origin, OriginKind, Settings, load_configuration, setting_specs
from pasture.core.errors import ConfigError


def test_defaults_need_nothing() -> None:
    configuration = load_configuration()
    assert configuration.settings == Settings()
    assert set(configuration.origins.values()) == {Origin(OriginKind.DEFAULT)}
    assert configuration.file is None


def test_the_stronger_source_wins_setting_by_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("pasture.toml").write_text('port = 1\nhost = "file"\nmax_queue = 7\n')
    monkeypatch.setenv("PASTURE_PORT", "2")
    monkeypatch.setenv("PASTURE_HOST", "environment")
    configuration = load_configuration({"port": "3"})
    settings = configuration.settings
    assert (settings.port, settings.host, settings.max_queue) == (3, "environment", 7)
    origins = configuration.origins
    assert origins["port"] == Origin(OriginKind.FLAG, "--port")
    assert origins["host"] == Origin(OriginKind.ENVIRONMENT, "PASTURE_HOST")
    assert origins["max_queue"] == Origin(OriginKind.FILE, "pasture.toml")
    assert origins["model"] == Origin(OriginKind.DEFAULT)


def test_every_setting_can_be_set_in_the_environment_and_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "api_key": "a,b",
        "cache_type_k": "q8_0",
        "cache_type_v": "q8_0",
        "flash_attn": "auto",
        "min_p": "0.1",
        "tensor_split": "3,1",
        "top_p": "0.5",
        "itl_target": "50ms",
        "weights": "f16",
        "kv_layout": "streams",
        "kv_compress": "q8_0",
        "kv_policy": "lru",
        "kv_remote": "redis://h",
        "share": "all",
        "log_level": "debug",
        "log_format": "json",
        "timeout": "5s",
    }
    skipped = {"kv_memory", "chat_template_file"}  # the other spelling of a setting that is set here
    for spec in setting_specs().values():
        text = values.get(spec.name, "true" if spec.is_switch else "100")
        if spec.name not in skipped:
            monkeypatch.setenv(spec.env_name, text)
    from_environment = load_configuration()
    assert {n for n, o in from_environment.origins.items() if o.kind is OriginKind.ENVIRONMENT} == set(
        setting_specs()
    ) - skipped
    assert from_environment.settings.api_key == ("a", "b")

    lines = [
        f"{spec.name.replace('_', '-')} = {'true' if spec.is_switch else repr(values.get(spec.name, '100'))}\n"
        for spec in setting_specs().values()
        if spec.name not in skipped
    ]
    Path("all.toml").write_text("".join(lines))
    for spec in setting_specs().values():
        monkeypatch.delenv(spec.env_name, raising=False)
    from_file = load_configuration(config_file=Path("all.toml"))
    assert from_file.settings == from_environment.settings


def test_the_file_is_looked_for_in_three_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    user = tmp_path / "user" / "pasture" / "pasture.toml"
    user.parent.mkdir(parents=True)
    user.write_text("port = 1")
    assert load_configuration().file == user
    Path("pasture.toml").write_text("port = 2")
    assert load_configuration().settings.port == 2
    Path("named.toml").write_text("port = 3")
    monkeypatch.setenv("PASTURE_CONFIG", "named.toml")
    assert load_configuration().settings.port == 3
    Path("flag.toml").write_text("port = 4")
    assert load_configuration(config_file=Path("flag.toml")).settings.port == 4


def test_a_flag_replaces_the_files_other_way_to_say_the_size() -> None:
    Path("pasture.toml").write_text('kv_memory = "1GiB"')
    settings = load_configuration({"kv_cells": "4096"}).settings
    assert (settings.kv_cells, settings.kv_memory) == (4096, None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"port": "eighty"}, r"^--port: .*integer"),
        ({"kv_memory": "2G"}, r"^--kv-memory: '2G' is not a size: write 2GiB or 2GB$"),
        ({"kv_memory": "1GiB", "kv_cells": "4096"}, "give one of them"),
        ({"kv_cache": "kv", "kv_ram": "0"}, "written through RAM"),
        ({"ssl_key_file": "key.pem"}, "go together"),
        ({"flash_attn": "off", "cache_type_v": "q8_0"}, "needs flash attention"),
        ({"max_running": "256"}, "^--max-running: .*254"),
        ({"max_queue": "0"}, "^--max-queue: "),
        ({"batch_size": "32"}, "raise batch_size, or lower max_running"),
        ({"cache_type_k": "q3"}, "^--cache-type-k: "),
        ({"itl_target": "0"}, "^--itl-target: "),
        ({"kv_cell": "4096"}, "no setting kv_cell; did you mean kv_cells"),
    ],
)
def test_mistakes_name_the_flag(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_configuration(flags)


def test_mistakes_name_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASTURE_KV_CELLS", "many")
    with pytest.raises(ConfigError, match=r"^PASTURE_KV_CELLS: "):
        load_configuration()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port = 'x'", r"^port in pasture.toml: "),
        ("prot = 80", r"^pasture.toml: there is no setting prot; did you mean port\?"),
        ("port = ", r"^pasture.toml: cannot be read: "),
    ],
)
def test_mistakes_name_the_file(text: str, message: str) -> None:
    Path("pasture.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_configuration()


def test_a_named_file_must_exist() -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_configuration(config_file=Path("absent.toml"))
