"""`pasture config`: what it shows, and what it must not."""

from __future__ import annotations

import json

import pytest

from tests.unit.cli.test_flags import run

SECRETS = ("hunter2", "swordfish", "opensesame", "letmein")


@pytest.fixture(autouse=True)
def _with_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASTURE_ADMIN_KEY", "opensesame")
    monkeypatch.setenv("PASTURE_API_KEY", "letmein,letmein2")
    monkeypatch.setenv("PASTURE_KV_REMOTE", "redis://cache:hunter2@10.0.0.5:6379")
    monkeypatch.setenv("PASTURE_STATE", "postgresql://pasture:swordfish@10.0.0.5/pasture")


def test_json_has_every_value_but_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("config", "--json") == 0
    printed = capsys.readouterr().out
    assert not any(secret in printed for secret in SECRETS)
    values = {name: row["value"] for name, row in json.loads(printed)["settings"].items()}
    assert values["admin_key"] == "***"
    assert values["api_key"] == ["***", "***"]
    assert values["kv_remote"] == "redis://cache:***@10.0.0.5:6379"
    assert values["state"] == "postgresql://pasture:***@10.0.0.5/pasture"
    assert values["kv_key_file"] is None


def test_the_table_says_that_a_secret_is_set(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run("config") == 0
    printed = capsys.readouterr().out
    assert not any(secret in printed for secret in SECRETS)
    assert "2 set, not shown" in printed
    assert "redis://cache:***@10.0.0.5:6379" in printed
