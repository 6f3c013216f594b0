"""`pasture warm`: which tokens it computes, what it says of files and servers that are of no use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pasture.bench.client import Endpoint
from pasture.cli.warm import Prefix, Warmed, WarmFailed, prefix_tokens, read_prefixes, warm_all
from pasture.core.errors import ConfigError
from tests.unit.bench.stub_openai import StubServer, response, serving


class WarmableServer(StubServer):
    """Every character is a token; its template prints a BOS, and puts words around messages."""

    def __init__(self, status: int = 200) -> None:
        super().__init__()
        self.asked: list[dict[str, object]] = []
        self._status = status

    def _plain(self, path: str, body: dict[str, object]) -> bytes:
        if path == "/props":
            return response(200, {"bos_token": "^"})
        if path == "/apply-template":
            messages: list[dict[str, str]] = body["messages"]  # type: ignore[assignment]
            return response(200, {"prompt": "^" + "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"})
        if path == "/tokenize":
            return response(200, {"tokens": [94] * bool(body["add_special"]) + [*str(body["content"]).encode()]})
        self.asked.append(body)
        if self._status != 200:
            return response(self._status, {"error": {"message": "the line is full"}})
        usage = {"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": 5}}
        return response(200, {"usage": usage})


SYSTEM = Prefix("a", ({"role": "system", "content": "Be kind."},))


async def test_a_prefix_ends_where_two_conversations_part_and_has_one_bos() -> None:
    async with serving(WarmableServer()) as server:
        assert bytes(await prefix_tokens(server.endpoint, SYSTEM, "^")) == b"^<system>Be kind.<user>"


async def test_a_conversation_that_ends_with_a_question_is_its_own_prefix() -> None:
    asked = Prefix("b", (*SYSTEM.messages, {"role": "user", "content": "Hi"}))
    async with serving(WarmableServer()) as server:
        assert bytes(await prefix_tokens(server.endpoint, asked, "^")) == b"^<system>Be kind.<user>Hi<assistant>"


async def test_one_token_is_asked_for_and_the_usage_is_told() -> None:
    done: list[Warmed] = []
    server = WarmableServer()
    async with serving(server):
        warmed = await warm_all(server.endpoint, [SYSTEM], 5, done.append)
    assert warmed == done == [Warmed("a", 23, 5)]
    assert warmed[0].computed == 18
    assert server.asked == [{"prompt": [*b"^<system>Be kind.<user>"], "max_tokens": 1, "temperature": 0}]


async def test_a_refusal_is_told_with_the_servers_reason() -> None:
    async with serving(WarmableServer(status=429)) as server:
        with pytest.raises(WarmFailed, match="429: the line is full"):
            await warm_all(server.endpoint, [SYSTEM], 5, lambda _: None)


async def test_no_server_is_told() -> None:
    async with serving(StubServer()) as server:
        gone = server.endpoint
    with pytest.raises(WarmFailed, match="nothing answers at http://127"):
        await warm_all(Endpoint("127.0.0.1", gone.port), [SYSTEM], 5, lambda _: None)


def test_text_is_a_system_prompt_and_lines_are_conversations(tmp_path: Path) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("Be kind.")
    lines.write_text(json.dumps(SYSTEM.messages) + "\n\n" + json.dumps([{"role": "user", "content": "Hi"}]) + "\n")
    assert read_prefixes(text) == [Prefix(str(text), SYSTEM.messages)]
    assert [prefix.name for prefix in read_prefixes(lines)] == [f"{lines}:1", f"{lines}:3"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", " \n", "is empty"),
        ("a.jsonl", "\n", "is empty"),
        ("a.jsonl", "[", "line 1 is not JSON"),
        ("a.jsonl", "[]", "not an array of messages"),
        ("a.jsonl", '["x"]', "not an array of messages"),
        ("a.jsonl", '[{"content": "x"}]', "not an array of messages"),
    ],
)
def test_files_without_a_prompt_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_prefixes(tmp_path / name)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_prefixes(tmp_path / "absent.txt")
