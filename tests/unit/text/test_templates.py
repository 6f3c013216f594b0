from __future__ import annotations

from datetime import datetime

import pytest

from pasture.core.errors import RequestError
from pasture.text.templates import CHATML, ChatTemplate

HELLO = [{"role": "user", "content": "Hello"}]


def template(source: str | None) -> ChatTemplate:
    return ChatTemplate(source, bos="<s>", eos="</s>", now=lambda: datetime(2024, 7, 26))


def test_messages_and_special_tokens_reach_the_template() -> None:
    source = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    assert template(source).render(HELLO) == "<s>[user] Hello</s>"


def test_a_model_without_a_template_gets_chatml() -> None:
    rendered = template(None).render([{"role": "system", "content": "Be brief."}, *HELLO])
    assert rendered == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert template(None).source == CHATML


def test_the_generation_prompt_can_be_left_out() -> None:
    assert template(None).render(HELLO, add_generation_prompt=False).endswith("<|im_end|>\n")


def test_block_lines_leave_no_whitespace_behind() -> None:
    assert (
        template("{% if true %}\n  {% for m in messages %}\n{{ m.content }}\n  {% endfor %}\n{% endif %}\n").render(HELLO)
        == "Hello\n"
    )


def test_tools_are_printed_with_their_characters_as_they_are() -> None:
    tools = [{"type": "function", "function": {"name": "café", "description": "a < b & c"}}]
    rendered = template("{% for tool in tools %}{{ tool | tojson }}{% endfor %}").render(HELLO, tools=tools)
    assert rendered == '{"type": "function", "function": {"name": "café", "description": "a < b & c"}}'


def test_without_tools_the_template_sees_none() -> None:
    assert template("{{ tools is none }}").render(HELLO, tools=[]) == "True"


def test_loop_controls_dates_and_generation_blocks_work() -> None:
    source = (
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    assert template(source).render([*HELLO, *HELLO]) == "26 Jul 2024Hello"


def test_variables_reach_the_template_but_do_not_replace_its_messages() -> None:
    source = "{{ enable_thinking }} {{ messages[0].content }}"
    assert template(source).render(HELLO, variables={"enable_thinking": False, "messages": []}) == "False Hello"


def test_a_refusal_of_the_template_is_the_clients_error() -> None:
    source = "{{ raise_exception('Only user and assistant roles are supported!') }}"
    with pytest.raises(RequestError, match="Only user and assistant roles") as caught:
        template(source).render(HELLO)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source", ["{% for m in messages %}", "{{ messages[0].content | no_such_filter }}", "{% endif %}", "{{" * 500]
)
def test_a_template_that_is_not_valid_says_so(source: str) -> None:
    with pytest.raises(RequestError, match="not valid"):
        template(source).render(HELLO)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content + 1 }}",
        "{{ messages[7].content }}",
        "{{ nothing.at.all }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content | tojson(indent='x' * 3) ~ (missing | tojson) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_a_template_that_fails_or_reaches_too_far_is_an_error_and_no_crash(source: str) -> None:
    with pytest.raises(RequestError, match="chat template"):
        template(source).render(HELLO)


def test_a_template_is_compiled_once() -> None:
    one = template("{{ messages[0].content }}")
    one.render(HELLO)
    compiled = one.__dict__["_template"]
    one.render(HELLO)
    assert one.__dict__["_template"] is compiled


def test_null_content_is_empty_text_unless_the_template_asks_for_null() -> None:
    call: list[dict[str, object]] = [{"role": "assistant", "content": None, "tool_calls": []}]
    assert template("[{{ messages[0].content }}]").render(call) == "[]"
    assert template("{% if messages[0]['content'] is none %}null{% endif %}").render(call) == "null"
