"""`pasture keys` and `pasture public`: what they print, and what a server finds afterwards."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from pasture.sessions.state import State
from tests.unit.cli.test_flags import run

FILE = "state.db"


@pytest.fixture
def in_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASTURE_STATE", FILE)


def test_a_new_key_is_alone_on_stdout_and_opens(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("keys", "add", "acme", "--label", "laptop", "--state", FILE) == 0
    secret = capsys.readouterr().out.strip()
    with closing(State(FILE)) as state:
        found = state.keyring.find(secret.encode())
    assert found is not None
    assert found.name == "acme"


@pytest.mark.usefixtures("in_settings")
def test_keys_are_listed_without_the_keys_and_revoked_by_id(capsys: pytest.CaptureFixture[str]) -> None:
    run("keys", "add", "acme")
    secret = capsys.readouterr().out.strip()
    assert run("keys", "ls", "--json") == 0
    text = capsys.readouterr().out
    (key,) = json.loads(text)["keys"]
    assert secret not in text
    assert key["revoked"] is None
    assert run("keys", "revoke", key["key_id"]) == 0
    with closing(State(FILE)) as state:
        assert state.keyring.find(secret.encode()) is None
    assert run("keys", "ls") == 0
    assert "revoked" in capsys.readouterr().out
    assert run("keys", "revoke", "nothing") == 1


@pytest.mark.usefixtures("in_settings")
def test_limits_are_set_and_taken_away(capsys: pytest.CaptureFixture[str]) -> None:
    run("keys", "add", "acme")
    capsys.readouterr()
    assert run("keys", "limit", "acme", "tokens_per_minute=500", "weight=1.5") == 0
    assert json.loads(capsys.readouterr().out)["tokens_per_minute"] == 500
    assert run("keys", "limit", "acme", "tokens_per_minute=none") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tokens_per_minute"], found["weight"]) == (None, 1.5)
    assert run("keys", "limit", "acme", "weight=much") == 2
    assert run("keys", "limit", "acme", "nonsense=1") == 1
    assert run("keys", "limit", "nobody", "weight=1") == 1


@pytest.mark.usefixtures("in_settings")
def test_public_prefixes_come_and_go(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = tmp_path / "house.txt"
    text.write_text("Be kind.")
    assert run("public", "add", str(text)) == 0
    assert run("public", "add", str(text), "--name", "raw", "--role", "none") == 0
    assert run("public", "add", str(text)) == 1, "the name is taken"
    assert run("public", "ls", "--json") == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)["public"]] == ["house", "raw"]
    assert run("public", "rm", "house") == 0
    with closing(State(FILE)) as state:
        assert [(one.name, one.role) for one in state.public.all()] == [("raw", None)]
    assert run("public", "rm", "house") == 1
    assert run("public", "add", str(tmp_path / "absent")) == 2


def test_without_a_state_there_is_nothing_to_work_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("keys", "ls") == 2
    assert "no state" in capsys.readouterr().err
