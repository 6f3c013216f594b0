"""What the documentation shows is true: every command line parses, and whatever can run without a model of yours runs.

Python runs on the engine without a model, curl and the clients against a server on it. What cannot be run is at least read:
TOML by its parser, commands by the command line's own.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import pasture
from pasture.cli.flags import normalise
from pasture.cli.main import app
from tests.e2e.test_serve_command import ENVIRONMENT, Server, command

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BASE_URL = "http://127.0.0.1:8080"


@dataclass(frozen=True)
class Snippet:
    page: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text.strip().splitlines()[0][:60]}"


def snippets(language: str) -> list[Snippet]:
    return [
        Snippet(page.name, language, text)
        for page in PAGES
        for text in re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    ]


def command_lines() -> list[Snippet]:
    """Of console snippets, what follows a prompt, continued lines joined."""
    return [
        Snippet(snippet.page, "console", line)
        for snippet in snippets("console")
        for line in re.findall(r"^\$ (.*)$", snippet.text.replace("\\\n", " "), re.MULTILINE)
    ]


def ours(line: str) -> list[list[str]]:
    """The calls of `pasture` in a command line, without what a shell does around them."""
    words = shlex.split(line, comments=True)
    calls: list[list[str]] = []
    for word in words:
        if word in ("&&", "|", ";", "||"):
            calls.append([])
        elif calls:
            calls[-1].append(word)
        else:
            calls.append([word])
    return [call[1:] for call in calls if call and call[0] == "pasture"]


OURS = [(line, call) for line in command_lines() for call in ours(line.text)]


@pytest.mark.parametrize(("line", "call"), OURS, ids=lambda value: str(value) if isinstance(value, Snippet) else "")
def test_every_command_line_is_one(line: Snippet, call: list[str]) -> None:
    parser: Any = get_command(app)
    arguments = normalise(call)
    while arguments and arguments[0] in getattr(parser, "commands", {}):
        parser = parser.commands[arguments.pop(0)]
    assert not hasattr(parser, "commands"), "a group without a command"
    parser.make_context("pasture", list(arguments))


@pytest.mark.parametrize("snippet", snippets("toml"), ids=str)
def test_toml_is_toml(snippet: Snippet) -> None:
    known = pasture.config.Settings.model_fields
    assert set(tomllib.loads(snippet.text)) <= set(known)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("docs"), "-c", "16384", "-a", "model")
    yield made
    made.close()


@pytest.mark.parametrize("snippet", snippets("python"), ids=str)
def test_python_runs(snippet: Snippet, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = pasture.open
    monkeypatch.setattr(pasture, "open", lambda model, **settings: opened(model, **{**settings, "fake_engine": True, **SMALL}))
    code = compile(snippet.text.replace(BASE_URL, server.url), str(snippet), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    names = {
        "pasture": pasture,
        "asyncio": asyncio,
        "system": {"role": "system", "content": "Be brief."},
        "questions": [{"role": "user", "content": f"Question {n}"} for n in range(3)],
    }
    if code.co_flags & inspect.CO_COROUTINE:
        asyncio.run(eval(code, names))
    else:
        exec(code, names)


SMALL = {"kv_cells": 4096, "kv_memory": None, "kv_ram": 0}


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
@pytest.mark.parametrize("line", [line for line in command_lines() if line.text.startswith("curl")], ids=str)
def test_curl_is_answered(line: Snippet, server: Server) -> None:
    called = ["curl", "--fail-with-body", "--max-time", "30", *shlex.split(line.text.replace(BASE_URL, server.url))[1:]]
    answer = subprocess.run(called, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stdout


RUNNABLE = {"config": [], "top --once": ["URL"], "doctor": ["URL"]}
"""the beginning of a command -> what has to be added"""


@pytest.mark.parametrize("call", sorted({" ".join(call) for _, call in OURS if " ".join(call) in RUNNABLE}))
def test_commands_that_need_no_model_run(call: str, server: Server, tmp_path: Path) -> None:
    arguments = [*call.split(), *(server.url for _ in RUNNABLE[call])]
    ended = subprocess.run(command(*arguments), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert ended.returncode in (0, 3 if call == "doctor" else 0), ended.stderr
    assert ended.stdout
