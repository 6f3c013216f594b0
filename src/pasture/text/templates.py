"""A model's own chat template, rendered in jinja2's immutable sandbox.

Templates are programs out of a model file, so they run where they can neither reach attributes of Python objects nor change
what they are given. The environment is the one that Hugging Face templates are written for: trimmed blocks, loop controls,
`tojson` that keeps characters as they are, `raise_exception`, `strftime_now`, and `{% generation %}` blocks, which mark the
assistant's turns for training and print their body. A model without a template gets ChatML.

Compiled once, at first use. Every failure, of the template or of `raise_exception` in it, is a RequestError. Any thread may
render.
Source: https://huggingface.co/docs/transformers/chat_templating
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pasture.core.errors import RequestError
from pasture.text.messages import Message, normalise

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_TELLS_NULL_CONTENT = re.compile(r"content\b['\"]?\]?\s+is\s+(not\s+)?none", re.IGNORECASE)


class ChatTemplate:
    """`source` is the template's text; None means ChatML. `bos` and `eos` are the texts of those tokens."""

    def __init__(self, source: str | None, *, bos: str, eos: str, now: Callable[[], datetime] = datetime.now) -> None:
        self.source = CHATML if source is None else source
        self.bos = bos
        self.eos = eos
        self._now = now
        self._keeps_null_content = _TELLS_NULL_CONTENT.search(self.source) is not None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt's text. `variables` (`chat_template_kwargs`) reach the template but cannot replace what is its own.

        Raises RequestError: messages the template refuses, or a template that does not work.
        """
        normal = normalise(messages, keep_null_content=self._keeps_null_content, keep_developer="developer" in self.source)
        context = {
            **(variables or {}),
            "messages": normal,
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.bos,
            "eos_token": self.eos,
        }
        template = self._template
        try:
            return template.render(context)
        except TemplateError as error:
            raise RequestError(f"the chat template refused these messages: {error}", param="messages") from error
        except Exception as error:  # whatever a template's expressions raise on values it did not expect
            kind = type(error).__name__
            raise RequestError(f"the chat template failed on these messages: {kind}: {error}", param="messages") from error

    def compile(self) -> None:
        """Compile now rather than at first use. Raises RequestError for a template that is not valid."""
        self._template  # noqa: B018 (fills the cache)

    @cached_property
    def _template(self) -> Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlocks]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: self._now().strftime(form)
        try:
            return environment.from_string(self.source)
        except TemplateSyntaxError as error:
            raise RequestError(f"the chat template is not valid (line {error.lineno}): {error}") from error
        except (TemplateError, RecursionError) as error:
            raise RequestError(f"the chat template is not valid: {error}") from error


class _GenerationBlocks(Extension):
    """`{% generation %}...{% endgeneration %}` prints its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes <, > and & for HTML, which would show models text that nobody wrote
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
