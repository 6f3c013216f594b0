"""Reading answers in tests."""

from __future__ import annotations

import json
from typing import Any

import httpx

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def chat_body(**fields: object) -> dict[str, object]:
    return {"model": "any", "messages": [{"role": "user", "content": "Hi"}], **fields}


def events(text: str) -> list[Any]:
    """The events of a stream, parsed; `[DONE]` stays a string."""
    data = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


def chat_texts(text: str) -> dict[int, str]:
    """The streamed text of each choice."""
    texts: dict[int, str] = {}
    for event in events(text)[:-1]:
        for choice in event["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["delta"].get("content", "")
    return texts


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object; fails unless the body is exactly OpenAI's shape."""
    body = response.json()
    assert set(body) == {"error"}, body
    assert set(body["error"]) == {"message", "type", "param", "code"}, body
    assert body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error
