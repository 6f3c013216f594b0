"""`/openapi.json`: every route with its body, parameters, answers and errors, from the schemas that check them.

Routes read their bodies themselves (bounded, strict JSON), so FastAPI cannot see what they take; `described` says it where the
route is made, and `install` puts the pieces together: bodies become components, and what the middleware does to every route
(keys, the shape of errors) is added to each. Nothing here runs while requests are answered.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from enum import Enum
from functools import cache
from http import HTTPStatus
from typing import Any, TypedDict

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode
from starlette.responses import Response

from pasture.api.answers import Error
from pasture.api.middleware import is_admins, is_open

Json = dict[str, Any]

_REF = "#/components/schemas/{model}"
_JSON = "application/json"
EVENTS = "text/event-stream"

_EVENT: Json = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
"""each event: before OpenAPI 3.2, tools take the schema of a stream for that"""

TAKES_BODY = (400, 408, 413)
"""errors of every route that reads a body"""
GENERATES = (408, 409, 429, 500, 503)
"""errors of every route that has the model compute something"""

_KEYS: list[dict[str, list[str]]] = [{"bearer": []}, {"x-api-key": []}]
_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
_NOT_OURS = ("HTTPValidationError", "ValidationError")


class RouteDocs(TypedDict):
    """Keyword arguments of a route's decorator."""

    response_class: type[Response]
    status_code: int
    responses: dict[int | str, Json]
    openapi_extra: Json
    tags: list[str | Enum]
    summary: str


def described(
    tag: str,
    summary: str,
    answer: type[BaseModel] | None = None,
    *,
    body: type[BaseModel] | None = None,
    status: int = 200,
    errors: Iterable[int] = (),
    media: str | None = None,
    upload: str | None = None,
    streams: bool = False,
    headers: Iterable[str] = (),
) -> RouteDocs:
    """How a route is documented.

    `media`, `upload`: of an answer or a body that is not JSON. `headers`: optional ones. `streams`: events, if asked for.
    """
    content: Json = {media: {"schema": _opaque(media)}} if media else {}
    if answer is not None:
        content = {_JSON: {"schema": _schema(answer, "serialization")}}
    if streams:
        content |= {EVENTS: {"schema": _EVENT}}
    extra: Json = {}
    if headers:
        extra["parameters"] = [
            {"name": name, "in": "header", "required": False, "schema": {"type": "string"}} for name in headers
        ]
    if body is not None:
        extra["requestBody"] = {"required": True, "content": {_JSON: {"schema": _schema(body, "validation")}}}
    elif upload is not None:
        extra["requestBody"] = {"required": True, "content": {upload: {"schema": _opaque(upload)}}}
    found = {*errors, *(TAKES_BODY if "requestBody" in extra else ())}
    responses: dict[int | str, Json] = {status: {"description": HTTPStatus(status).phrase, "content": content}}
    responses |= {code: _error(code) for code in sorted(found)}
    return RouteDocs(
        response_class=Response, status_code=status, responses=responses, openapi_extra=extra, tags=[tag], summary=summary
    )


def install(app: FastAPI, *, admin: bool) -> None:
    """Make the app describe itself so. `admin`: whether there is an admin key."""

    def openapi() -> Json:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, routes=app.routes, summary=app.summary)
            app.openapi_schema = complete(found, admin=admin)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way


def complete(found: Json, *, admin: bool) -> Json:
    """FastAPI's schema with what it cannot know. Changes `found` and returns it."""
    components: Json = found.setdefault("components", {})
    schemas: Json = components.setdefault("schemas", {})
    for name in _NOT_OURS:
        schemas.pop(name, None)
    for path, operations in found["paths"].items():
        for operation in operations.values():
            responses: Json = operation["responses"]
            if responses.pop("422", None):
                responses.setdefault("400", deepcopy(_error(400)))
            if is_open(path):
                operation["security"] = []
                continue
            operation["security"] = _KEYS
            responses["401"] = deepcopy(_error(401))
            if not admin and is_admins(path):
                responses.setdefault("404", deepcopy(_error(404)))
            for code, response in responses.items():
                if code >= "400":
                    response["content"] = deepcopy(_error(int(code))["content"])
    components["securitySchemes"] = _SCHEMES
    _hoist(found["paths"], schemas)
    return found


def _hoist(value: object, schemas: Json) -> None:
    """Move schemas that stand in place, with their definitions, to the components; leaves references."""
    if isinstance(value, list):
        for item in value:
            _hoist(item, schemas)
    if not isinstance(value, dict):
        return
    for name, item in value.items():
        if name == "schema" and isinstance(item, dict) and "title" in item and item.keys() & {"properties", "items", "anyOf"}:
            schemas.update(item.pop("$defs", {}))
            schemas[item["title"]] = item
            value[name] = {"$ref": _REF.format(model=item["title"])}
        else:
            _hoist(item, schemas)


@cache
def _schema(model: type[BaseModel], mode: JsonSchemaMode) -> Json:
    return model.model_json_schema(ref_template=_REF, mode=mode)


@cache
def _error(status: int) -> Json:
    return {"description": HTTPStatus(status).phrase, "content": {_JSON: {"schema": _schema(Error, "serialization")}}}


def _opaque(media: str) -> Json:
    return {"type": "string"} if media.startswith("text/") else {"type": "string", "format": "binary"}
