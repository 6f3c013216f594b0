"""The command line reads llama.cpp's spellings as llama.cpp does, and tells of mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest

from pasture import __version__
from pasture.cli.flags import normalise
from pasture.cli.main import main
from pasture.config import setting_specs


def run(*arguments: str) -> int:
    """The exit code of a command line."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return cast(int, ended.value.code)


def settings_of(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, object]:
    """What the flags set, by name."""
    assert run("config", "--json", *flags) == 0
    rows = json.loads(capsys.readouterr().out)["settings"]
    return {name: row["value"] for name, row in rows.items() if row["origin"] == "flag"}


def test_llama_cpp_short_options(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "-m m.gguf -c 8192 -ngl 99 -t 4 -tb 8 -b 1024 -ub 256 -ctk q8_0 -ctv q4_0 -fa -np 16 -a small --mlock --no-mmap"
    assert settings_of(capsys, *flags.split()) == {
        "model": "m.gguf",
        "kv_cells": 8192,
        "n_gpu_layers": 99,
        "threads": 4,
        "threads_batch": 8,
        "batch_size": 1024,
        "ubatch_size": 256,
        "cache_type_k": "q8_0",
        "cache_type_v": "q4_0",
        "flash_attn": "on",
        "max_running": 16,
        "alias": "small",
        "mlock": True,
        "mmap": False,
    }


def test_llama_cpp_long_options(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--model m.gguf --ctx-size 8192 --n-gpu-layers 9 --cache-type-k f16 --host :: --port 1 --api-key k --parallel 3"
    found = settings_of(capsys, *flags.split())
    assert (found["kv_cells"], found["n_gpu_layers"], found["host"], found["max_running"]) == (8192, 9, "::", 3)
    assert found["api_key"] == ["***"], "a secret is never printed"


@pytest.mark.parametrize(
    ("typed", "value"),
    [("-fa", "on"), ("-fa off", "off"), ("-fa 1", "on"), ("--flash-attn auto", "auto"), ("-fa --mlock", "on")],
)
def test_flash_attention_with_and_without_a_value(capsys: pytest.CaptureFixture[str], typed: str, value: str) -> None:
    assert settings_of(capsys, *typed.split())["flash_attn"] == value


def test_normalise_leaves_everything_else_alone() -> None:
    words = ["serve", "-m", "x.gguf", "-ngl", "99", "-fa", "off"]
    assert normalise(words) == words
    assert normalise(["-fa", "-c", "8"]) == ["-fa", "on", "-c", "8"]


def test_every_spelling_of_every_setting_is_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    values = {
        "SIZE": "1GiB",
        "TIME": "1s",
        "LAYOUT": "auto",
        "TYPE": "f16",
        "LEVEL": "info",
        "P": "0.5",
        "on|off|auto": "on",
        "text|json": "json",
    }
    values |= {"FORM": "q8_0", "WITH": "all", "POLICY": "lru", "URL": "redis://h", "WEIGHTS": "f16"}
    partners = {
        "ssl_key_file": ["--ssl-cert-file", "c"],
        "ssl_cert_file": ["--ssl-key-file", "k"],
        "kv_key_file": ["--kv-cache", "d"],
        "admin_port": ["--admin-key", "k"],
        "peer_key_file": ["--peer", "north=http://h:1"],
    }
    for spec in setting_specs().values():
        for name in filter(None, (*spec.flag.names, spec.flag.off)):
            argument = [] if spec.is_switch else [values.get(spec.flag.metavar, "100")]
            assert spec.name in settings_of(capsys, name, *argument, *partners.get(spec.name, [])), name


def test_the_table_says_where_values_come_from(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASTURE_HOST", "0.0.0.0")
    monkeypatch.setenv("COLUMNS", "140")
    Path("pasture.toml").write_text('kv_memory = "2GiB"')
    assert run("config", "--port", "9000", "--no-mmap", "--api-key", "geheim") == 0
    table = capsys.readouterr().out
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:4]]
        for line in table.splitlines()
        if "│" in line
    }
    assert rows["port"] == ["9000", "--port"]
    assert rows["host"] == ["0.0.0.0", "PASTURE_HOST"]
    assert rows["kv_memory"] == ["2 GiB", "pasture.toml"]
    assert rows["mmap"] == ["off", "--no-mmap"]
    assert "geheim" not in table


def test_a_wrong_value_is_one_line_and_exit_code_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("config", "--kv-memory", "2G") == 2
    captured = capsys.readouterr()
    assert captured.err == "pasture: --kv-memory: '2G' is not a size: write 2GiB or 2GB\n"
    assert captured.out == ""


def test_an_unknown_flag_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("config", "--kv-cels", "1") == 2
    assert "--kv-cells" in capsys.readouterr().err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"pasture {__version__}\n"
    assert run("--help") == 0
    assert "shared KV cache" in capsys.readouterr().out
