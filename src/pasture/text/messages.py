"""Chat messages as clients send them -> as chat templates expect them.

Clients send content as a string, as a list of parts, or as null beside tool calls, and tool-call arguments as JSON text;
templates concatenate strings and print arguments with `tojson`. This module bridges the two and refuses what a text model
cannot read. It knows no template and no wire schema: a message is a mapping with a `role`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from pasture.core.errors import RequestError

Message = Mapping[str, object]


def normalise(
    messages: Sequence[Message], *, keep_null_content: bool = False, keep_developer: bool = False
) -> list[dict[str, object]]:
    """Copies with text content and parsed tool-call arguments. Raises RequestError naming the message at fault.

    `keep_null_content`: the template tells null from empty content, so null stays; otherwise it becomes "".
    `keep_developer`: the template knows the role `developer`; otherwise it becomes `system`, OpenAI's older word for it.
    """
    if not messages:
        raise RequestError("messages must hold at least one message", param="messages")
    normal = [_normalise_one(message, f"messages.{i}", keep_null_content) for i, message in enumerate(messages)]
    if not keep_developer:
        for message in normal:
            if message["role"] == "developer":
                message["role"] = "system"
    return normal


def _normalise_one(message: Message, where: str, keep_null_content: bool) -> dict[str, object]:
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError("each message needs a role", param=f"{where}.role")
    content = message.get("content")
    result = {**message, "content": None if content is None and keep_null_content else _flatten(content, f"{where}.content")}
    calls = message.get("tool_calls")
    if calls is None:
        result.pop("tool_calls", None)
    elif isinstance(calls, list):
        result["tool_calls"] = [_parse_arguments(call, f"{where}.tool_calls.{i}") for i, call in enumerate(calls)]
    else:
        raise RequestError("tool_calls must be a list", param=f"{where}.tool_calls")
    return result


def _flatten(content: object, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError("content must be a string or a list of parts", param=where)
    return "".join(_part_text(part, f"{where}.{i}") for i, part in enumerate(content))


def _part_text(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise RequestError("a content part must be an object", param=where)
    kind = part.get("type", "text")
    if kind not in ("text", "input_text", "output_text", "refusal"):
        raise RequestError(f"this model reads text only; a content part of type {kind!r} cannot be used", param=f"{where}.type")
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise RequestError("a text part needs a string field 'text'", param=f"{where}.text")
    return text


def _parse_arguments(call: object, where: str) -> object:
    """The call with its arguments as an object; arguments that are not a JSON object stay text."""
    if not isinstance(call, dict):
        raise RequestError("a tool call must be an object", param=where)
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
        json.dumps(arguments, ensure_ascii=False).encode()  # half a surrogate pair would be no text
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call
