"""A request log: one JSON object a line, each a body as it was sent to `/v1/chat/completions`, in the order of arrival.

    {"user": "ada", "messages": [...], "tools": [...]}
    {"user": "ada", "tenant": "sales", "body": {"messages": [...]}, "reply": "what the model answered"}

`user`, `tenant` and `reply` are optional, beside the body or in it. Knows nothing of servers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from pasture.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class LoggedRequest:
    line: int
    """in the log, from 1"""
    messages: tuple[Message, ...]
    tools: tuple[str, ...]
    """each as JSON with sorted keys, in the order in which they were sent"""
    user: str | None
    tenant: str | None
    reply: str | None

    @property
    def system(self) -> str:
        """The system prompt; empty where there is none."""
        first = self.messages[0]
        return first.content if first.role in ("system", "developer") else ""


def read_log(lines: Iterable[str]) -> list[LoggedRequest]:
    """Raises ConfigError with the number of the first line that is no request."""
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(_request(number, json.loads(line)))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ConfigError(f"line {number} is not a chat request in JSON: {error}") from error
    return found


def _request(number: int, entry: dict[str, object]) -> LoggedRequest:
    body = entry.get("body", entry)
    if not isinstance(body, dict):
        raise TypeError("body is not an object")
    messages = tuple(Message(str(message["role"]), _text(message.get("content"))) for message in body["messages"])
    if not messages:
        raise ValueError("messages are empty")
    tools = tuple(json.dumps(tool, sort_keys=True) for tool in body.get("tools") or ())
    user, tenant, reply = (entry.get(name, body.get(name)) for name in ("user", "tenant", "reply"))
    return LoggedRequest(number, messages, tools, _optional(user), _optional(tenant), _optional(reply))


def _text(content: object) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return "" if content is None else str(content)


def _optional(value: object) -> str | None:
    return None if value is None else str(value)
