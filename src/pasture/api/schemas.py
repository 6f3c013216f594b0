"""Request bodies, checked. Field names are OpenAI's, and llama-server's for what OpenAI does not have.

Fields nobody here knows are ignored, as OpenAI-compatible servers do; fields that would change the answer and cannot be
honoured are refused by name. Nothing here knows the model: what depends on the vocabulary is checked in `pasture.api.jobs`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, PlainValidator

from pasture.core.errors import RequestError

MAX_STOP_STRINGS = 32
MAX_STOP_CHARACTERS = 1024
MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_MESSAGES = 10_000
MAX_REQUESTS = 256
"""prompts times choices in one call"""

UNSUPPORTED: Mapping[str, str] = {
    "functions": "functions are not supported; send them as tools",
    "function_call": "function_call is not supported; send tools and tool_choice",
    "continue_final_message": "continuing a final message is not supported; send the rendered text to /v1/completions",
    "guided_grammar": "grammars are taken in llama.cpp's form; send them as grammar",
    "audio": "this model has no audio",
    "suffix": "filling in before a suffix is not supported",
    "lora": "adapters are not supported",
    "use_beam_search": "beam search is not supported",
    "xtc_probability": "the XTC sampler is not supported",
    "dynatemp_range": "a dynamic temperature is not supported",
}
"""field -> why; refused unless its value is null, false or empty"""


def refuse_unsupported(body: Mapping[str, JsonValue]) -> None:
    """Raise RequestError for the first field of `UNSUPPORTED` that asks for something."""
    for name, reason in UNSUPPORTED.items():
        if body.get(name):
            raise RequestError(reason, param=name)


def _stop_strings(value: object) -> tuple[str, ...]:
    strings = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
        raise ValueError("must be a string or a list of strings")
    if len(strings) > MAX_STOP_STRINGS:
        raise ValueError(f"at most {MAX_STOP_STRINGS} stop strings")
    if any(len(string) > MAX_STOP_CHARACTERS for string in strings):
        raise ValueError(f"a stop string has at most {MAX_STOP_CHARACTERS} characters")
    return tuple(strings)


def _logit_bias(value: object) -> dict[int, float]:
    """OpenAI's {"id": bias}, or llama-server's [[id, bias], ...], where `false` bans the token."""
    if value is None:
        return {}
    pairs: list[object] = list(value.items()) if isinstance(value, dict) else value if isinstance(value, list) else [None]
    return dict(_bias_pair(pair) for pair in pairs)


def _bias_pair(pair: object) -> tuple[int, float]:
    match pair:
        case [int() | str() as token, False]:
            return _token_id(token), -math.inf
        case [int() | str() as token, int() | float() as bias] if not isinstance(bias, bool):
            return _token_id(token), float(bias)
    raise ValueError("must map token ids to numbers")


def _token_id(token: int | str) -> int:
    if isinstance(token, str) and not (token.isascii() and token.isdecimal() and len(token) < 12):
        raise ValueError(f"{token[:40]!r} is not a token id")
    return int(token)


Prompt = str | list[int]


def _prompts(value: object) -> list[Prompt]:
    """One prompt or several, each text or token ids."""
    if isinstance(value, str) or _is_tokens(value):
        return [value]  # type: ignore[list-item]  # _is_tokens has looked
    if isinstance(value, list) and len(value) > MAX_REQUESTS:
        raise ValueError(f"at most {MAX_REQUESTS} prompts in one call")
    if isinstance(value, list) and value and all(isinstance(item, str) or _is_tokens(item) for item in value):
        return value
    raise ValueError("must be a string, a list of strings, a list of token ids, or a list of such lists")


def _is_tokens(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _unlimited(value: object) -> object:
    # llama-server and its clients spell "no limit" as -1
    return None if value == -1 else value


_AtLeastOne = Annotated[int, Field(ge=1)]
MaxTokens = Annotated[
    int | None, Field(ge=1), BeforeValidator(_unlimited, json_schema_input_type=_AtLeastOne | Literal[-1] | None)
]

_StopString = Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)]
_StopInput = _StopString | Annotated[list[_StopString], Field(max_length=MAX_STOP_STRINGS)] | None
_BiasInput = (
    dict[Annotated[str, Field(pattern="^[0-9]{1,11}$")], float | Literal[False]]
    | list[tuple[int | str, float | Literal[False]]]
    | None
)
_TokenIds = Annotated[list[int], Field(min_length=1)]
_PromptInput = str | _TokenIds | Annotated[list[str | _TokenIds], Field(min_length=1, max_length=MAX_REQUESTS)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, frozen=True)


SessionId = Annotated[str, Field(min_length=1, max_length=256)]
SessionMode = Literal["auto", "append", "replace"]
"""whether messages sent in a session are the new ones, the whole conversation, or whichever they look like"""


class StreamOptions(_Body):
    include_usage: bool = False


class FormBody(_Body):
    """What the reply must be, beside `response_format`; one of them at most."""

    grammar: str | None = None
    """in GBNF"""
    json_schema: dict[str, JsonValue] | None = None
    guided_json: dict[str, JsonValue] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = None


class GenerationBody(FormBody):
    """What chat and plain completions have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    response_format: dict[str, JsonValue] | None = None
    stop: Annotated[tuple[str, ...], PlainValidator(_stop_strings, json_schema_input_type=_StopInput)] = ()
    max_tokens: MaxTokens = None
    user: str | None = None
    ignore_eos: bool | None = None
    deadline_seconds: Annotated[float, Field(gt=0)] | None = None
    service_tier: Literal["auto", "default", "flex", "priority", "scale"] | None = None
    prompt_cache_key: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    pasture: bool | None = None
    """asks for the `pasture` object in the answer: where the request's time went"""

    temperature: Annotated[float, Field(ge=0)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repeat_last_n: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    dry_multiplier: Annotated[float, Field(ge=0)] | None = None
    dry_base: Annotated[float, Field(ge=1)] | None = None
    dry_allowed_length: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    dry_penalty_last_n: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    mirostat: Annotated[int, Field(ge=0, le=2)] | None = None
    mirostat_tau: Annotated[float, Field(ge=0)] | None = None
    mirostat_eta: Annotated[float, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    logit_bias: Annotated[dict[int, float], PlainValidator(_logit_bias, json_schema_input_type=_BiasInput)] = {}


class TemplateBody(_Body):
    """What the chat template is given; alone, the body of /apply-template."""

    messages: Annotated[list[dict[str, JsonValue]], Field(max_length=MAX_MESSAGES)]
    tools: list[dict[str, JsonValue]] | None = None
    tool_choice: JsonValue = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, JsonValue] | None = None


class ChatBody(GenerationBody, TemplateBody):
    session_id: SessionId | None = None
    session_mode: SessionMode | None = None
    max_completion_tokens: MaxTokens = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    modalities: list[str] | None = None


class CompletionBody(GenerationBody):
    prompt: Annotated[list[Prompt], PlainValidator(_prompts, json_schema_input_type=_PromptInput)]
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


class TokenizeBody(_Body):
    content: str
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeBody(_Body):
    tokens: list[int]
