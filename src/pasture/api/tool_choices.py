"""Which tools a chat's reply may call, and whether it must: `tools` and `tool_choice` -> what to look for in the reply.

Calls are looked for where there are tools, and the model has a dialect for calling them that is known here. A call that must be
made is a constraint: the dialect's tags around JSON that suits one of the tools. A reply that is bound to another form holds no
calls.
"""

from __future__ import annotations

from collections.abc import Sequence

import orjson
from pydantic import JsonValue

from pasture.api.schemas import ChatBody
from pasture.core.errors import RequestError
from pasture.core.values import Constraint, ConstraintKind
from pasture.text.tool_calls import Dialect


def forced_call(body: ChatBody, dialect: Dialect | None) -> Constraint | None:
    """What makes the reply a call, where the request wants one. Raises RequestError for a choice that there is not."""
    match body.tool_choice:
        case None | "none" | "auto":
            return None
        case "required":
            wanted = None
        case {"type": "function", "function": {"name": str(name)}}:
            wanted = name
        case _:
            raise _refused("tool_choice can be 'auto', 'none', 'required', or a function by its name")
    if dialect is None:
        raise _refused("the chat template teaches no form of calls that is known here, so none can be forced")
    functions = [function for function in _functions(body.tools or ()) if wanted in (None, function["name"])]
    if not functions:
        raise _refused("there is no tool to call" if wanted is None else f"there is no tool {wanted[:64]!r} to call")
    schemas = [_call_schema(function, f"#/anyOf/{i}", dialect) for i, function in enumerate(functions)]
    before, after = dialect.around
    try:
        text = orjson.dumps({"anyOf": schemas}).decode()
    except TypeError as error:  # deeper than orjson writes
        raise RequestError("a tool's parameters are nested too deeply", param="tools") from error
    return Constraint(ConstraintKind.JSON_SCHEMA, text, "tools", before, after)


def _refused(why: str) -> RequestError:
    return RequestError(why, param="tool_choice")


def _functions(tools: Sequence[dict[str, JsonValue]]) -> list[dict[str, JsonValue]]:
    """The functions among the tools that have a name."""
    functions = [tool.get("function") for tool in tools]
    return [function for function in functions if isinstance(function, dict) and isinstance(function.get("name"), str)]


def _call_schema(function: dict[str, JsonValue], place: str, dialect: Dialect) -> dict[str, JsonValue]:
    """Of a call to this function; `place`: where the schema will stand, as a reference."""
    parameters = function.get("parameters") or {"type": "object"}
    arguments = _moved(parameters, f"{place}/properties/{dialect.arguments}")
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, dialect.arguments: arguments},
        "required": ["name", dialect.arguments],
        "additionalProperties": False,
    }


def _moved(schema: JsonValue, place: str) -> JsonValue:
    """The schema with its references to itself as they must be when it stands at `place` in another."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _moved(value, place) for name, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved
