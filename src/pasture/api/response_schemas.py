"""The body of `POST /v1/responses`, and what it is as a chat.

Inputs are items (messages, function calls and their outputs); a chat has messages. What a text model without server-side tools
cannot honour is refused by name, as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field, JsonValue

from pasture.api.schemas import MAX_MESSAGES, ChatBody, FormBody, MaxTokens
from pasture.core.errors import RequestError
from pasture.sessions.values import Message

Item = dict[str, JsonValue]

_UNSUPPORTED: Mapping[str, str] = {
    "background": "background responses are not supported",
    "conversation": "conversations are not supported; use previous_response_id",
    "prompt": "stored prompts are not supported",
    "top_logprobs": "log probabilities are not supported here; /v1/chat/completions has them",
    "session_id": "a response has no session; use previous_response_id",
}


class ResponseBody(FormBody):
    model: str | None = None
    input: str | Annotated[list[Item], Field(max_length=MAX_MESSAGES)]
    instructions: str | None = None
    previous_response_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    store: bool | None = None
    stream: bool | None = None
    max_output_tokens: MaxTokens = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    metadata: Annotated[dict[str, JsonValue], Field(max_length=64)] | None = None
    tools: list[Item] | None = None
    tool_choice: JsonValue = None
    parallel_tool_calls: bool | None = None
    text: dict[str, JsonValue] | None = None
    truncation: str | None = None
    user: str | None = None
    service_tier: Literal["auto", "default", "flex", "priority", "scale"] | None = None
    background: JsonValue = None
    conversation: JsonValue = None
    prompt: JsonValue = None
    top_logprobs: JsonValue = None
    session_id: JsonValue = None

    # beyond OpenAI, as in chats
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    ignore_eos: bool | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None
    deadline_seconds: Annotated[float, Field(gt=0)] | None = None
    pasture: bool | None = None


_SAME = (
    "model", "stream", "temperature", "top_p", "tool_choice", "user", "service_tier", "seed", "top_k", "min_p", "ignore_eos",
    "chat_template_kwargs", "deadline_seconds", "pasture", *FormBody.model_fields,
)  # fmt: skip
"""fields that mean the same in a chat"""


def check(body: ResponseBody) -> None:
    """Raises RequestError for what cannot be honoured."""
    for name, reason in _UNSUPPORTED.items():
        if getattr(body, name):
            raise RequestError(reason, param=name)
    if body.truncation not in (None, "disabled"):
        raise RequestError("nothing is left out of a conversation: truncation must be 'disabled'", param="truncation")
    if not isinstance((body.text or {}).get("format"), dict | None):
        raise RequestError("text.format is an object", param="text.format")


def new_messages(body: ResponseBody) -> list[Message]:
    """The input as chat messages: calls belong to the message before them. Raises RequestError for an item that is none."""
    if isinstance(body.input, str):
        return [{"role": "user", "content": body.input}]
    found: list[Message] = []
    for i, item in enumerate(body.input):
        message = _message(item, f"input.{i}")
        if message is None:
            continue
        if "tool_calls" in message and found and found[-1]["role"] == "assistant":
            before = found.pop()
            message = {**before, "tool_calls": [*_calls(before), *_calls(message)]}
        found.append(message)
    return found


def as_chat(body: ResponseBody, messages: Sequence[Message]) -> ChatBody:
    """The chat that answers it; `messages`: what was said before, and the input."""
    instructions = [{"role": "system", "content": body.instructions}] if body.instructions else []
    fields = {name: getattr(body, name) for name in _SAME}
    fields["messages"] = [*instructions, *messages]
    fields["max_completion_tokens"] = body.max_output_tokens
    match body.tool_choice:
        case {"type": "function", "name": str(name)}:
            fields["tool_choice"] = {"type": "function", "function": {"name": name}}
    fields["response_format"] = (body.text or {}).get("format")
    fields["tools"] = [_tool(tool, f"tools.{i}") for i, tool in enumerate(body.tools or ())] or None
    return ChatBody.model_validate(fields)


def _message(item: Item, where: str) -> Message | None:
    match item:
        case {"type": "function_call", "name": str(name), "arguments": str(arguments), "call_id": str(call_id)}:
            call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
            return {"role": "assistant", "content": None, "tool_calls": [call]}
        case {"type": "function_call_output", "call_id": str(call_id), "output": output}:
            return {"role": "tool", "tool_call_id": call_id, "content": output}
        case {"type": "reasoning"}:
            return None  # a client that sends back all it got; this server gives none
        case {"role": str(role), "content": content} if item.get("type", "message") == "message":
            return {"role": role, "content": content}
    raise RequestError("an input item is a message, a function_call or a function_call_output", param=where)


def _calls(message: Message) -> list[object]:
    calls = message.get("tool_calls")
    return calls if isinstance(calls, list) else []


def _tool(tool: Item, where: str) -> dict[str, object]:
    if tool.get("type") != "function" or not isinstance(tool.get("name"), str):
        raise RequestError("only function tools with a name are supported", param=where)
    return {"type": "function", "function": {name: value for name, value in tool.items() if name not in ("type", "strict")}}
