"""`pasture serve` as a process: it says where it listens, answers, drains when told to end, and fails in one line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Timer
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

_LIMIT_SECONDS = 60.0
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PASTURE_")} | {"COLUMNS": "200"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pasture", *arguments]


class Server:
    """A running `pasture serve`; `banner` is what it said until it named its URL."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.process = subprocess.Popen(
            command("serve", "--fake-engine", "--port", "0", *flags),
            cwd=folder,
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._limit = Timer(_LIMIT_SECONDS, self.process.kill)
        self._limit.start()
        assert self.process.stderr is not None
        self.banner = ""
        for line in self.process.stderr:
            self.banner += line
            if found := re.search(r"serves at (http\S+)/v1", line):
                self.url = found[1]
                return
        raise AssertionError(f"no URL: {self.banner}")

    def post(self, path: str, body: dict[str, object], key: str | None = None) -> dict[str, object]:
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        with urlopen(Request(self.url + path, json.dumps(body).encode(), headers), timeout=30) as answer:
            found: dict[str, object] = json.load(answer)
            return found

    def end(self) -> tuple[int, str]:
        """Exit code and the rest of stderr."""
        self.process.send_signal(signal.SIGTERM)
        _, rest = self.process.communicate(timeout=30)
        return self.process.returncode, rest

    def close(self) -> None:
        self._limit.cancel()
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "pasture.toml").write_text('api_key = ["from-the-file"]\nkv_cells = 4096\n')
    server = Server(tmp_path, "-a", "herd")
    try:
        yield server
    finally:
        server.close()


def test_serves_with_settings_from_file_and_flags_and_drains(server: Server) -> None:
    body: dict[str, object] = {"model": "herd", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    with pytest.raises(HTTPError) as refused:
        server.post("/v1/chat/completions", body)
    assert refused.value.code == 401
    refused.value.close()
    answer = server.post("/v1/chat/completions", body, key="from-the-file")
    assert answer["model"] == "herd"
    code, rest = server.end()
    assert code == 0
    assert "Traceback" not in rest


def test_a_second_server_on_the_same_port_says_so(server: Server, tmp_path: Path) -> None:
    port = server.url.rpartition(":")[2]
    second = subprocess.run(
        command("serve", "--fake-engine", "--port", port),
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert second.returncode == 2
    assert f"pasture: cannot listen on 127.0.0.1 port {port}: Address already in use" in second.stderr
    assert "Traceback" not in second.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["serve"], 2, "no model: give -m FILE"),
        (["serve", "-m", "absent.gguf"], 1, "no model file at absent.gguf"),
        (["serve", "-m", "text.gguf"], 1, "is not a GGUF file"),
        (["check", "text.gguf"], 1, "is not a GGUF file"),
        (["serve", "--fake-engine", "--api-key-file", "absent"], 2, "absent cannot be read"),
        (
            ["serve", "--fake-engine", "--ssl-key-file", "absent", "--ssl-cert-file", "absent"],
            2,
            "ssl_cert_file: absent cannot be read",
        ),
        (["serve", "--fake-engine", "--host", "203.0.113.1"], 2, "cannot listen on 203.0.113.1"),
    ],
)
def test_what_cannot_work_is_one_clear_line(tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    (tmp_path / "text.gguf").write_text("Once upon a time")
    ended = subprocess.run(command(*arguments), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == code
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("pasture: ")
    assert message in last
    assert "Traceback" not in ended.stderr


def test_what_was_warmed_is_found_and_outlives_the_server(tmp_path: Path) -> None:
    (tmp_path / "handbook.txt").write_text("Everything about sheep, and about the common they graze on. " * 8)
    flags = ("--kv-cache", str(tmp_path / "cache"), "--warm", "handbook.txt")
    computed = []
    for _ in range(2):
        server = Server(tmp_path, *flags)
        try:
            warm = command("warm", "handbook.txt", "--url", server.url, "--json")
            told = subprocess.run(warm, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=True)
            (row,) = json.loads(told.stdout)["prefixes"]
            assert row["computed"] == 1, "all but the last token was there"
            code, rest = server.end()
        finally:
            server.close()
        assert code == 0
        computed.append(int(re.search(r"warm\s+1 prefixes: (\d+) tokens computed", rest)[1]))  # type: ignore[index]
    assert computed == [row["tokens"], 1]
