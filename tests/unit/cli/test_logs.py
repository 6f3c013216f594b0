"""Log lines for programs: one JSON object each, with the request's id, and never what people wrote."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import httpx
import pytest

from pasture.api import create_app
from pasture.cli.logs import JsonLines
from tests.unit.stub_service import StubService

SECRET = "the password is sheep"


class Lines(logging.Handler):
    """Formats in the moment, as a stream's handler does."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonLines())
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler = Lines()
    logger = logging.getLogger("pasture")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


async def post(service: StubService, **fields: object) -> httpx.Response:
    transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://pasture") as client:
        body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 4, **fields}
        return await client.post("/v1/chat/completions?x=1", json=body, headers={"x-request-id": "mine"})


async def test_an_answered_request_is_a_line_with_its_id(lines: Lines) -> None:
    assert (await post(StubService())).status_code == 200
    (line,) = [json.loads(line) for line in lines.lines]
    assert (line["logger"], line["message"], line["request_id"]) == ("pasture.requests", "answered", "mine")
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/chat/completions", 200)
    assert line["seconds"] >= 0
    assert line["time"].endswith("+00:00")


async def test_what_goes_wrong_has_the_requests_id_and_not_its_text(lines: Lines) -> None:
    answer = await post(StubService(error=ZeroDivisionError("a bug")))
    assert answer.status_code == 500
    told = [json.loads(line) for line in lines.lines]
    assert {line["request_id"] for line in told} == {"mine"}
    (failure,) = [line for line in told if line["level"] == "error"]
    assert "ZeroDivisionError: a bug" in failure["exception"]
    assert SECRET not in "".join(lines.lines)


async def test_machines_that_ask_every_few_seconds_are_no_news(lines: Lines) -> None:
    transport = httpx.ASGITransport(create_app(StubService()))
    async with httpx.AsyncClient(transport=transport, base_url="http://pasture") as client:
        for path in ("/health", "/metrics", "/v1/live/now"):
            await client.get(path)
    assert lines.lines == []


def test_outside_of_requests_there_is_no_id() -> None:
    record = logging.LogRecord("pasture", logging.WARNING, "here", 1, "%d sheep", (3,), None)
    line = json.loads(JsonLines().format(record))
    assert line["message"] == "3 sheep"
    assert "request_id" not in line
