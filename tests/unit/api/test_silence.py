"""What people say, and their keys, are in no log, whatever the level and whatever goes wrong."""

from __future__ import annotations

import logging

import pytest

from tests.session_support import world

SAID = "Rosebud-4711"


async def test_nothing_that_was_said_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    message = {"role": "user", "content": f"The word is {SAID}"}
    system = {"role": "system", "content": SAID}
    bodies: list[tuple[str, object]] = [
        ("/chat/completions", {"messages": [message], "max_tokens": 4, "user": SAID}),
        ("/chat/completions", {"messages": [message], "prompt_cache_key": SAID, "max_tokens": 4}),
        ("/chat/completions", {"messages": [message], "temperature": SAID}),
        ("/chat/completions", {"messages": [{"role": SAID, "content": {"a": SAID}}]}),
        ("/chat/completions", {"messages": [message], "stream": True, "max_tokens": 4}),
        ("/chat/completions", {"messages": [message], "session_id": SAID}),
        ("/completions", {"prompt": SAID * 2000}),
        ("/responses", {"input": [message], "instructions": SAID, "max_output_tokens": 4}),
        ("/sessions", {"messages": [system], "name": f"{SAID}-2", "metadata": {"a": SAID}}),
        ("/sessions", {"messages": [system], "name": SAID}),
        ("/sessions/import", [SAID]),
    ]
    async with world(["one"]) as at, at.http("one") as client:
        statuses = [(await client.post(path, json=body)).status_code for path, body in bodies]
        assert {200, 201, 400, 404, 409} <= set(statuses)
        await client.get("/sessions", headers={"authorization": f"Bearer {SAID}"})
        key = at.keys["one"]
    ours = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore", "asyncio"))]
    assert ours, "something is logged"
    for record in ours:
        text = logging.Formatter().format(record)
        assert SAID not in text, record
        assert key not in text, record
