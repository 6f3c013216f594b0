from __future__ import annotations

import pytest

from pasture.core.errors import RequestError
from pasture.text.messages import normalise
from pasture.text.templates import ChatTemplate


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one "}, "two ", {"text": "three"}]
    assert normalise([{"role": "user", "content": parts}]) == [{"role": "user", "content": "one two three"}]


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_parts_that_are_not_text_are_refused_by_name(kind: str) -> None:
    with pytest.raises(RequestError, match=kind) as caught:
        normalise([{"role": "user", "content": "hi"}, {"role": "user", "content": [{"type": kind}]}])
    assert caught.value.param == "messages.1.content.0.type"


def test_tool_call_arguments_become_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert normalise([message])[0]["tool_calls"] == [{**call, "function": {"name": "f", "arguments": {"a": 1}}}]
    assert call["function"] == {"name": "f", "arguments": '{"a": 1}'}, "the client's own message is left alone"


@pytest.mark.parametrize("arguments", ["not json", "[1]", "[" * 100_000])
def test_tool_call_arguments_that_are_no_object_stay_text(arguments: str) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    assert normalise([{"role": "assistant", "tool_calls": [call]}])[0]["tool_calls"] == [call]


def test_other_fields_of_a_message_are_kept() -> None:
    message = {"role": "tool", "content": "4", "tool_call_id": "1", "name": "add", "tool_calls": None}
    assert normalise([message]) == [{"role": "tool", "content": "4", "tool_call_id": "1", "name": "add"}]


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"role": ""},
        {"role": 1},
        {"role": "user", "content": 5},
        {"role": "user", "content": [5]},
        {"role": "user", "content": [{"type": "text", "text": None}]},
        {"role": "user", "content": [{"type": ["text"], "text": ""}]},
        {"role": "assistant", "tool_calls": "f()"},
        {"role": "assistant", "tool_calls": ["f()"]},
    ],
)
def test_what_is_no_message_is_refused_with_its_place(message: dict[str, object]) -> None:
    with pytest.raises(RequestError) as caught:
        normalise([message])
    assert caught.value.param is not None
    assert caught.value.param.startswith("messages.0.")


def test_no_messages_are_refused() -> None:
    with pytest.raises(RequestError, match="at least one"):
        normalise([])


def test_developer_is_system_to_a_template_that_does_not_know_it() -> None:
    sent = [{"role": "developer", "content": "Be brief."}]
    assert normalise(sent)[0]["role"] == "system"
    assert normalise(sent, keep_developer=True)[0]["role"] == "developer"
    assert ChatTemplate(None, bos="", eos="").render(sent).startswith("<|im_start|>system")
    known = ChatTemplate("{{ messages[0]['role'] }}{# developer #}", bos="", eos="")
    assert known.render(sent) == "developer"


def test_arguments_that_would_be_no_text_stay_as_they_came() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": "\\ud800"}'}}
    (message,) = normalise([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert message["tool_calls"] == [call]
