"""Tool calls that a model writes into its reply, taken out of the text while it arrives.

A model calls tools in the words that its chat template taught it:

    Hermes, Qwen    text <tool_call>{"name": ..., "arguments": {...}}</tool_call> <tool_call>...</tool_call> text
    Llama 3.x       {"name": ..., "parameters": {...}}                               the whole reply

A scanner withholds what may still become a call and releases it as text once it cannot: a broken call is text, nothing is lost
but the whitespace around calls, which the template writes itself when it shows the message again. What comes out does not
depend on how the text was cut into chunks. One scanner a reply; no thread of its own.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NoReturn, Protocol

from pasture.text.replies import Fragment, ScoredToken, ToolCall

_OPEN = "<tool_call>"
_CLOSE = "</tool_call>"
_ESCAPED = re.compile(r"\\.", re.DOTALL)

NewId = Callable[[], str]


class Dialect(StrEnum):
    """How a model writes its calls."""

    HERMES = "hermes"
    LLAMA = "llama"

    @property
    def arguments(self) -> str:
        """What a call names its arguments."""
        return "arguments" if self is Dialect.HERMES else "parameters"

    @property
    def around(self) -> tuple[str, str]:
        """What stands before and behind a call's JSON."""
        return (f"{_OPEN}\n", f"\n{_CLOSE}") if self is Dialect.HERMES else ("", "")


def dialect_of(template: str) -> Dialect | None:
    """What a chat template teaches, by the words in it; None where that is no dialect known here."""
    if _OPEN in template:
        others = ("<function=", "<arg_key>")  # calls in XML, between the same tags
        return None if any(word in template for word in others) else Dialect.HERMES
    return Dialect.LLAMA if '"parameters"' in template and "ipython" in template else None


@dataclass(frozen=True, slots=True)
class Found:
    """What more of a reply turned out to be."""

    text: str
    calls: tuple[ToolCall, ...] = ()


class Scanner(Protocol):
    def push(self, text: str) -> Found:
        """What the reply up to the end of `text` is certain to be, beyond what was returned before."""
        ...

    def finish(self) -> Found:
        """What is left when no text will follow."""
        ...


def new_id() -> str:
    return "call_" + secrets.token_hex(12)


def scanner_of(dialect: Dialect, make_id: NewId = new_id) -> Scanner:
    return HermesScanner(make_id) if dialect is Dialect.HERMES else LlamaScanner(make_id)


async def read_calls(
    fragments: AsyncGenerator[Fragment, None], dialect: Dialect, make_id: NewId = new_id
) -> AsyncGenerator[Fragment, None]:
    """The fragments with calls apart from text. Takes over `fragments` and closes it, however the reading ends.

    Log probabilities of what is withheld come with the next fragment.
    """
    scanner = scanner_of(dialect, make_id)
    async with aclosing(fragments):
        scored: list[ScoredToken] = []
        async for fragment in fragments:
            scored.extend(fragment.scored)
            found = scanner.push(fragment.text)
            if fragment.finish is not None:
                rest = scanner.finish()
                found = Found(found.text + rest.text, (*found.calls, *rest.calls))
            if found.text or found.calls or fragment.finish is not None:
                yield Fragment(found.text, tuple(scored), fragment.finish, found.calls)
                scored.clear()


class HermesScanner:
    """Calls between tags, any number, with text around them."""

    __slots__ = ("_body_at", "_called", "_held", "_make_id", "_searched")

    def __init__(self, make_id: NewId) -> None:
        self._make_id = make_id
        self._held = ""
        """whitespace and the beginning of a tag; in a call, all from the whitespace before it on"""
        self._body_at: int | None = None
        """where the call's JSON begins in it; None outside of calls"""
        self._searched = 0
        """before here no call ends"""
        self._called = False

    def push(self, text: str) -> Found:
        self._held += text
        shown: list[str] = []
        calls: list[ToolCall] = []
        while self._opened(shown) and self._closed(shown, calls):
            pass
        return Found("".join(shown), tuple(calls))

    def finish(self) -> Found:
        held, self._held = self._held, ""
        if self._body_at is not None:
            call = _call(held[self._body_at :], Dialect.HERMES, self._make_id)
            return Found(held) if call is None else Found("", (call,))
        return Found("" if self._called and held.isspace() else held)

    def _opened(self, shown: list[str]) -> bool:
        """Whether a call has begun. Releases the text before it."""
        if self._body_at is not None:
            return True
        at = self._held.find(_OPEN)
        end = len(self._held) - _withheld(self._held) if at < 0 else len(self._held[:at].rstrip())
        shown.append(self._held[:end])
        self._held = self._held[end:]
        if at < 0:
            return False
        self._body_at = self._searched = at - end + len(_OPEN)
        return True

    def _closed(self, shown: list[str], calls: list[ToolCall]) -> bool:
        """Whether the call has ended: as a call, or as text where it is none."""
        assert self._body_at is not None
        while (at := self._held.find(_CLOSE, self._searched)) >= 0:
            body, end = self._held[self._body_at : at], at + len(_CLOSE)
            call = _call(body, Dialect.HERMES, self._make_id)
            if call is None and _in_string(body):
                self._searched = end  # an argument that talks of tags
                continue
            if call is None:
                shown.append(self._held[:end])
            else:
                calls.append(call)
                self._called = True
            self._held, self._body_at = self._held[end:], None
            return True
        self._searched = max(self._searched, len(self._held) - len(_CLOSE) + 1)
        return False


class LlamaScanner:
    """A reply that is one call, or none. Withholds whatever begins with a brace until its end."""

    __slots__ = ("_held", "_is_call", "_make_id")

    def __init__(self, make_id: NewId) -> None:
        self._make_id = make_id
        self._held: list[str] = []
        self._is_call: bool | None = None
        """as far as its first character tells; None before that"""

    def push(self, text: str) -> Found:
        if self._is_call is False:
            return Found(text)
        self._held.append(text)
        if self._is_call is None and text.strip():
            self._is_call = text.lstrip().startswith("{")
        return self._release() if self._is_call is False else Found("")

    def finish(self) -> Found:
        held = self._release()
        call = _call(held.text, Dialect.LLAMA, self._make_id)
        return held if call is None else Found("", (call,))

    def _release(self) -> Found:
        held = "".join(self._held)
        self._held.clear()
        return Found(held)


def _withheld(text: str) -> int:
    """How many of the last characters may belong to a call: the beginning of its tag, and whitespace before it."""
    n = next(n for n in range(len(_OPEN) - 1, -1, -1) if text.endswith(_OPEN[:n]))
    before = text[: len(text) - n]
    return n + len(before) - len(before.rstrip())


def _in_string(json_text: str) -> bool:
    """Whether the text ends within a string of its JSON."""
    return _ESCAPED.sub("", json_text).count('"') % 2 == 1


def _call(text: str, dialect: Dialect, make_id: NewId) -> ToolCall | None:
    try:
        found = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    name, arguments = found.get("name"), found.get(dialect.arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    return ToolCall(make_id(), name, json.dumps(arguments, ensure_ascii=False))


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def assistant_message(text: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
    """A reply as a message of its conversation, as OpenAI's API has it."""
    if not calls:
        return {"role": "assistant", "content": text}
    return {"role": "assistant", "content": text or None, "tool_calls": [call.as_json() for call in calls]}
