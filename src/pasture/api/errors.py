"""Errors -> HTTP, in the shape of OpenAI's API: `{"error": {"message", "type", "param", "code"}}`.

Two tables and nothing else decide: one for pasture's own error classes (a subclass without a line takes its parent's), one
for the statuses that the web framework raises by itself. Messages of errors that are not the client's fault are not shown to
it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from pasture.core.errors import (
    Conflict,
    DeadlineExceeded,
    EngineError,
    Forbidden,
    NoReplica,
    NotFound,
    PastureError,
    PeerFailed,
    PromptTooLong,
    QueueFull,
    RateLimited,
    RequestError,
    ShuttingDown,
)

_log = logging.getLogger("pasture.api")


@dataclass(frozen=True, slots=True)
class Answer:
    """How a class of errors is told to a client."""

    status: int
    kind: str
    code: str | None = None


ANSWERS: Mapping[type[PastureError], Answer] = {
    RequestError: Answer(400, "invalid_request_error"),
    PromptTooLong: Answer(400, "invalid_request_error", "context_length_exceeded"),
    QueueFull: Answer(429, "rate_limit_error", "queue_full"),
    RateLimited: Answer(429, "rate_limit_error", "rate_limit_exceeded"),
    NotFound: Answer(404, "invalid_request_error", "not_found"),
    Conflict: Answer(409, "conflict_error", "conflict"),
    Forbidden: Answer(403, "permission_error", "forbidden"),
    DeadlineExceeded: Answer(408, "timeout_error", "deadline_exceeded"),
    PeerFailed: Answer(502, "server_error", "peer_failed"),
    ShuttingDown: Answer(503, "unavailable_error", "shutting_down"),
    NoReplica: Answer(503, "unavailable_error", "no_replica"),
    EngineError: Answer(500, "server_error", "engine_error"),
    PastureError: Answer(500, "server_error", "internal_error"),
}

STATUSES: Mapping[int, Answer] = {
    400: Answer(400, "invalid_request_error"),
    401: Answer(401, "authentication_error", "invalid_api_key"),
    404: Answer(404, "invalid_request_error", "not_found"),
    405: Answer(405, "invalid_request_error", "method_not_allowed"),
    408: Answer(408, "timeout_error", "request_timeout"),
    413: Answer(413, "invalid_request_error", "request_too_large"),
    503: Answer(503, "unavailable_error", "unavailable"),
}

_INTERNAL = Answer(500, "server_error", "internal_error")


@dataclass(frozen=True, slots=True)
class Problem:
    """One error as it goes out: status, headers beyond the usual, and the JSON body."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    def response(self) -> Response:
        return Response(self.body, self.status, dict(self.headers), media_type="application/json")


def problem(error: Exception) -> Problem:
    """The problem that an exception is, for a response or for an event in a stream that has begun."""
    if isinstance(error, HTTPException):
        answer = STATUSES.get(error.status_code, Answer(error.status_code, "invalid_request_error"))
        return _problem(answer, str(error.detail), headers=error.headers or {})
    if isinstance(error, ValidationError):
        message, param = explain(error)
        return _problem(STATUSES[400], message, param)
    if isinstance(error, RequestValidationError):  # of a path, a query or a header: bodies are read elsewhere
        first = error.errors()[0]
        param = ".".join(str(step) for step in first["loc"][1:])
        return _problem(STATUSES[400], f"{param}: {first['msg']}", param)
    if not isinstance(error, PastureError):
        _log.error("a request failed: %s", error, exc_info=error)
        return _problem(_INTERNAL, "the server failed on this request")
    answer = next(ANSWERS[kind] for kind in type(error).__mro__ if kind in ANSWERS)
    if answer.status == 500:
        _log.error("a request failed: %s", error)
    param = error.param if isinstance(error, RequestError) else None
    return _problem(answer, str(error), param, _retry(error))


def explain(error: ValidationError) -> tuple[str, str | None]:
    """(message, parameter) of the first thing wrong in a body."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = ".".join(str(step) for step in first["loc"]) or None
    reason = first["msg"]
    return (f"{param}: {reason}" if param else reason), param


def install(app: FastAPI) -> None:
    """Make every error that is expected, the framework's own included, leave in this shape."""

    async def answer(_: Request, error: Exception) -> Response:
        return problem(error).response()

    for kind in (HTTPException, PastureError, ValidationError, RequestValidationError):
        app.add_exception_handler(kind, answer)


def _problem(answer: Answer, message: str, param: str | None = None, headers: Mapping[str, str] | None = None) -> Problem:
    error = {"message": message, "type": answer.kind, "param": param, "code": answer.code}
    return Problem(answer.status, orjson.dumps({"error": error}), headers or {})


def _retry(error: PastureError) -> dict[str, str]:
    if isinstance(error, QueueFull):
        return {"retry-after": str(max(1, math.ceil(error.retry_after_seconds)))}
    if isinstance(error, ShuttingDown | NoReplica):
        return {"retry-after": "5"}
    if isinstance(error, DeadlineExceeded):  # OpenAI's clients send it again by themselves otherwise, to the same end
        return {"x-should-retry": "false"}
    return {}
