"""Calls in text, cut at every place: what is a call, what stays text, and that nothing is lost."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pasture.core.values import Finish, FinishReason, TokenLogprobs, Usage
from pasture.text.replies import Fragment, ScoredToken, ToolCall
from pasture.text.tool_calls import Dialect, assistant_message, dialect_of, read_calls, scanner_of

HERMES, LLAMA = Dialect.HERMES, Dialect.LLAMA
END = Finish(FinishReason.STOP, Usage(1, 0, 1))


def tag(name: str, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def read(dialect: Dialect, pieces: Sequence[str]) -> tuple[str, list[tuple[str, object]]]:
    """(text, [(name, arguments), ...])"""
    numbers = count()
    scanner = scanner_of(dialect, lambda: f"call_{next(numbers)}")
    found = [*(scanner.push(piece) for piece in pieces), scanner.finish()]
    calls = [call for one in found for call in one.calls]
    assert [call.call_id for call in calls] == [f"call_{i}" for i in range(len(calls))]
    return "".join(one.text for one in found), [(call.name, json.loads(call.arguments)) for call in calls]


CASES: list[tuple[Dialect, str, str, list[tuple[str, object]]]] = [
    (HERMES, "Just text.", "Just text.", []),
    (HERMES, "Just text. \n", "Just text. \n", []),
    (HERMES, tag("f"), "", [("f", {})]),
    (HERMES, f"Wait.\n{tag('f', a=1)}", "Wait.", [("f", {"a": 1})]),
    (HERMES, f"{tag('f', a='ü')}\n{tag('g', b=[1, {}])}\n", "", [("f", {"a": "ü"}), ("g", {"b": [1, {}]})]),
    (HERMES, f"One {tag('f')} two", "One two", [("f", {})]),
    (HERMES, tag("f", a="</tool_call> <tool_call>"), "", [("f", {"a": "</tool_call> <tool_call>"})]),
    (HERMES, tag("f", a='a quoted "</tool_call>" and \\'), "", [("f", {"a": 'a quoted "</tool_call>" and \\'})]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {}}', "", [("f", {})]),
    (HERMES, '  <tool_call>{"name": "f", "argu', '  <tool_call>{"name": "f", "argu', []),
    (HERMES, "a < b, <tool, <tool_call", "a < b, <tool, <tool_call", []),
    (HERMES, " <tool_call>no</tool_call> ", " <tool_call>no</tool_call> ", []),
    (HERMES, f" <tool_call>no</tool_call> {tag('f')}", " <tool_call>no</tool_call>", [("f", {})]),
    (HERMES, f"{tag('f')} <tool_call>[]</tool_call>", " <tool_call>[]</tool_call>", [("f", {})]),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>', '<tool_call>{"name": "f"}</tool_call>', []),
    (HERMES, '<tool_call>{"name": 5, "arguments": {}}</tool_call>', '<tool_call>{"name": 5, "arguments": {}}</tool_call>', []),
    (HERMES, "<tool_call>" + "[" * 5000, "<tool_call>" + "[" * 5000, []),
    (HERMES, '{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {}}', []),
    (LLAMA, "Just text.", "Just text.", []),
    (LLAMA, ' {"name": "f", "parameters": {"a": 1}}\n', "", [("f", {"a": 1})]),
    (LLAMA, '{"name": "f", "parameters": {"a": 1}', '{"name": "f", "parameters": {"a": 1}', []),
    (LLAMA, '{"name": "f", "parameters": {}} and more', '{"name": "f", "parameters": {}} and more', []),
    (LLAMA, '{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {}}', []),
    (LLAMA, '{"name": "f", "parameters": {"a": NaN}}', '{"name": "f", "parameters": {"a": NaN}}', []),
    (LLAMA, 'Well: {"name": "f", "parameters": {}}', 'Well: {"name": "f", "parameters": {}}', []),
    (LLAMA, " \n ", " \n ", []),
]


@pytest.mark.parametrize(("dialect", "reply", "text", "calls"), CASES)
def test_a_reply_is_read_the_same_wherever_it_is_cut(
    dialect: Dialect, reply: str, text: str, calls: list[tuple[str, object]]
) -> None:
    assert read(dialect, [reply]) == (text, calls)
    assert read(dialect, list(reply)) == (text, calls)
    for at in range(min(len(reply), 200)):
        assert read(dialect, [reply[:at], reply[at:]]) == (text, calls)


@given(st.lists(st.sampled_from(["<tool_call>", "</tool_call>", tag("f"), " ", "\n", "x", '"', "{", "<tool"]), max_size=12))
def test_whatever_is_written_nothing_but_whitespace_is_lost(parts: list[str]) -> None:
    reply = "".join(parts)
    text, calls = read(HERMES, list(reply))
    assert (text, calls) == read(HERMES, [reply])
    if calls:
        assert len("".join(text.split())) + len(calls) * len("".join(tag("f").split())) == len("".join(reply.split()))
    else:
        assert text == reply


def test_text_is_shown_as_soon_as_it_cannot_be_a_call() -> None:
    scanner = scanner_of(HERMES)
    assert [scanner.push(piece).text for piece in ("Hello", " <", "b>", " ", "<tool_call>", "x</tool_call>")] == [
        "Hello", "", " <b>", "", "", " <tool_call>x</tool_call>",
    ]  # fmt: skip
    assert [scanner_of(LLAMA).push("Hello").text, scanner_of(LLAMA).push("{").text] == ["Hello", ""]


@pytest.mark.parametrize(
    ("template", "dialect"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ('...<tool_call>\\n{"name": ...', HERMES),
        ("<tool_call>\\n<function=example>", None),
        ("<tool_call>{name}<arg_key>", None),
        ('Environment: ipython ... {"name": function name, "parameters": ...}', LLAMA),
        ('{"parameters": x}', None),
    ],
)
def test_a_template_tells_the_dialect(template: str, dialect: Dialect | None) -> None:
    assert dialect_of(template) is dialect


def test_a_reply_becomes_the_message_that_a_client_would_send_back() -> None:
    call = ToolCall("call_1", "f", '{"a": 1}')
    assert assistant_message("Hi", ()) == {"role": "assistant", "content": "Hi"}
    assert assistant_message("", (call,)) == {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
    }


async def test_fragments_carry_calls_and_every_log_probability() -> None:
    pieces = ["Hi ", "<tool_call>", '{"name": "f", ', '"arguments": {}}', "</tool_call>", "", " bye"]
    scored = [ScoredToken(i, TokenLogprobs(-1.0, ()), i) for i in range(len(pieces))]
    closed = False

    async def fragments() -> AsyncGenerator[Fragment, None]:
        nonlocal closed
        try:
            for i, piece in enumerate(pieces):
                yield Fragment(piece, (scored[i],), END if i == len(pieces) - 1 else None)
        finally:
            closed = True

    found = [fragment async for fragment in read_calls(fragments(), HERMES, lambda: "call_1")]
    assert [(one.text, len(one.calls)) for one in found] == [("Hi", 0), ("", 1), (" bye", 0)]
    assert [token for one in found for token in one.scored] == scored
    assert found[-1].finish is END
    assert closed
