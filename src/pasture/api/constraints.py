"""What a body asks its reply to be, in the words of OpenAI, llama-server and vLLM -> one constraint.

    OpenAI        response_format, text.format: {"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema"}}
    llama-server  response_format {"type": "json_object", "schema"}; json_schema; grammar, in GBNF
    vLLM          guided_json, guided_regex, guided_choice

Only the form is looked at here. Whether it can be compiled is the engine's to say, off this loop.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import orjson
from pydantic import JsonValue

from pasture.api.schemas import GenerationBody
from pasture.core.errors import RequestError
from pasture.core.values import Constraint, ConstraintKind

_ANY_OBJECT = '{"type":"object"}'


def constraint_of(body: GenerationBody, format_param: str = "response_format") -> Constraint | None:
    """The one constraint of a request, or none. Raises RequestError for two, and for what is none.

    `format_param`: what the request calls its `response_format`.
    """
    found = [*_from_format(body.response_format or {}, format_param), *_from_fields(body)]
    if len(found) > 1:
        names = " and ".join(str(constraint.param) for constraint in found)
        raise RequestError(f"a reply can be bound to one form, not to {names} at once", param=found[1].param)
    return found[0] if found else None


def _from_format(form: Mapping[str, JsonValue], param: str) -> Iterator[Constraint]:
    match form.get("type", "text"):
        case "text" | None:
            return
        case "json_object":
            yield _schema(form["schema"], param) if form.get("schema") else _json(_ANY_OBJECT, param)
        case "json_schema":
            named = form.get("json_schema", form)
            if not isinstance(named, dict) or "schema" not in named:
                raise RequestError("a format of type json_schema needs a schema", param=param)
            yield _schema(named["schema"], param)
        case kind:
            raise RequestError(f"the format can be text, json_object or json_schema, not {str(kind)[:40]!r}", param=param)


def _from_fields(body: GenerationBody) -> Iterator[Constraint]:
    if body.json_schema is not None:
        yield _schema(body.json_schema, "json_schema")
    if body.grammar:
        yield Constraint(ConstraintKind.GBNF, body.grammar, "grammar")
    if body.guided_json is not None:
        given = body.guided_json
        yield _json(given, "guided_json") if isinstance(given, str) else _schema(given, "guided_json")
    if body.guided_regex:
        yield Constraint(ConstraintKind.REGEX, body.guided_regex, "guided_regex")
    if body.guided_choice is not None:
        pattern = "|".join(re.escape(choice) for choice in body.guided_choice)
        yield Constraint(ConstraintKind.REGEX, pattern, "guided_choice")


def _schema(schema: JsonValue, param: str) -> Constraint:
    if not isinstance(schema, dict):
        raise RequestError("a JSON schema is an object", param=param)
    try:
        return _json(orjson.dumps(schema).decode(), param)
    except TypeError as error:  # deeper than orjson writes
        raise RequestError("the JSON schema is nested too deeply", param=param) from error


def _json(text: str, param: str) -> Constraint:
    return Constraint(ConstraintKind.JSON_SCHEMA, text, param)
