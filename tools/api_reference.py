"""The API reference as Markdown, made of the schema that the server itself checks requests and answers against.

Knows OpenAPI, and nothing of routes: what is not in `/openapi.json` is not in the reference. Used while the site is built;
prints the page when it is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pasture.api import create_app
from pasture.config import Settings
from pasture.server import start_service

Json = dict[str, Any]

_METHODS = ("get", "post", "delete", "put", "patch")
_INTRODUCTION = """# API reference

Made from the schema that the server serves at `/openapi.json`, so it cannot say anything else than the server does. What the
routes are for, and how sessions and responses work, is told in [API](api.md). Errors all have the same shape; their statuses
are listed with each route.
"""


def schema() -> Json:
    """The OpenAPI document of a server without a model."""
    service = start_service(Settings(fake_engine=True, kv_cells=256, kv_ram=0))
    try:
        return create_app(service).openapi()
    finally:
        service.close()


def reference(document: Json) -> str:
    """The page: every route under its tag, then every named object."""
    by_tag: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method in _METHODS:
            if (operation := operations.get(method)) is not None:
                by_tag.setdefault((operation.get("tags") or ["Other"])[0], []).append(_route(path, method, operation))
    parts = [_INTRODUCTION, *(f"## {tag}\n\n" + "\n".join(routes) for tag, routes in by_tag.items())]
    named = document["components"]["schemas"]
    return "\n".join([*parts, "## Objects\n", *(_object(name, value) for name, value in sorted(named.items()))])


def _route(path: str, method: str, operation: Json) -> str:
    lines = [f"### `{method.upper()} {path}`\n", f"{operation.get('summary', '')}.\n"]
    body = _content(operation.get("requestBody", {}))
    if body:
        lines.append(f"Takes {body}.\n")
    for parameter in operation.get("parameters", ()):
        needed = "" if parameter.get("required") else ", optional"
        lines.append(f"- `{parameter['name']}` ({parameter['in']}{needed}): {_type(parameter['schema'])}")
    good, bad = [], []
    for status, answer in operation["responses"].items():
        if status.startswith("2"):
            good.append(f"{status}: {_content(answer) or 'nothing'}")
        else:
            bad.append(status)
    lines.append(f"\nAnswers {'; '.join(good)}." + (f" Errors: {', '.join(sorted(bad))}." if bad else ""))
    return "\n".join(lines) + "\n"


def _object(name: str, value: Json) -> str:
    lines = [f"### {name}\n"]
    if text := value.get("description"):
        lines.append(f"{text}\n")
    fields = list(_fields(value))
    if fields:
        lines += ["| field | type | |", "|---|---|---|", *fields]
    else:
        lines.append(_type(value))
    return "\n".join(lines) + "\n"


def _fields(value: Json) -> Iterator[str]:
    required = set(value.get("required", ()))
    for name, field in value.get("properties", {}).items():
        notes = ["required"] if name in required else []
        if field.get("default") not in (None, [], {}):
            notes.append(f"usually `{field['default']}`")
        if text := field.get("description"):
            notes.append(" ".join(text.split()))
        yield f"| `{name}` | {_type(field)} | {'; '.join(notes)} |".replace("|  |", "| |")


def _content(holder: Json) -> str:
    """What a body may be, by its media types."""
    kinds = [
        _type(what["schema"]) if media == "application/json" and what.get("schema") else f"`{media}`"
        for media, what in holder.get("content", {}).items()
    ]
    return " or ".join(kinds)


def _type(value: Json) -> str:
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf", "allOf"):
        if key in value:
            kinds = [_type(option) for option in value[key] if option.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    if "const" in value or "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value.get("enum", [value.get("const")]))
    if value.get("type") == "array":
        return f"list of {_type(value.get('items', {}))}"
    limits = [f"{sign} {value[key]}" for key, sign in (("minimum", "≥"), ("maximum", "≤")) if key in value]
    return " ".join([str(value.get("type", "anything")), *limits])


if __name__ == "__main__":
    print(reference(schema()))
