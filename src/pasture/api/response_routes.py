"""`/v1/responses`: answers that the server keeps, so that the next request names the last one and sends only what is new.

`instructions` belong to one request and are not carried on; inputs and replies are. A reply is kept before its client is told
that it is complete, so that the next turn can follow at once. What cannot be kept is an error for a client that asked for it
(`store: true`); one that did not say gets the reply, which says that it is not stored.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

import orjson
from fastapi import APIRouter, Request
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import Response

from pasture.api.answers import Deleted, StoredResponseBody
from pasture.api.bodies import read_body
from pasture.api.callers import Caller, caller_of
from pasture.api.disconnect import cancelled_on_disconnect
from pasture.api.explanations import Past
from pasture.api.gateway import Gateway
from pasture.api.offload import off_loop, size_of
from pasture.api.openapi import GENERATES, described
from pasture.api.response_formats import Json, ResponseWriter
from pasture.api.response_schemas import ResponseBody, as_chat, check, new_messages
from pasture.api.runs import Run
from pasture.api.streams import EventStream
from pasture.core.errors import NotFound, RateLimited
from pasture.core.values import Finish
from pasture.sessions.database import reason
from pasture.sessions.values import Message, StoredResponse
from pasture.text.replies import ToolCall
from pasture.text.tool_calls import assistant_message

_log = logging.getLogger("pasture.api")


def response_routes(gateway: Gateway) -> APIRouter:
    """Routes over the gateway's service and its stored responses."""
    router = APIRouter(prefix="/v1/responses")
    state = gateway.state

    @router.post(
        "",
        **described(
            "Responses",
            "A reply that the server keeps; the next request names it and sends only what is new",
            StoredResponseBody,
            body=ResponseBody,
            errors=(404, *GENERATES),
            streams=True,
        ),
    )
    async def create(request: Request) -> Response:
        body = await read_body(request, ResponseBody, gateway.settings.max_body_bytes)
        check(body)
        answering = await _prepare(gateway, caller_of(request, state), body)
        if body.stream:
            return EventStream(answering.events())
        async with cancelled_on_disconnect(request.receive):
            return _json(await answering.whole())

    @router.get("/{response_id}", **described("Responses", "A kept reply", StoredResponseBody, errors=(404,)))
    async def show(response_id: str, request: Request) -> Response:
        found = await asyncio.to_thread(state.responses.get, caller_of(request, state).tenant, response_id)
        return _json(dict(found.body))

    @router.delete("/{response_id}", **described("Responses", "Forget a kept reply", Deleted, errors=(404,)))
    async def delete(response_id: str, request: Request) -> Response:
        await asyncio.to_thread(state.responses.delete, caller_of(request, state).tenant, response_id)
        return _json({"id": response_id, "object": "response", "deleted": True})

    return router


async def _prepare(gateway: Gateway, caller: Caller, body: ResponseBody) -> _Answering:
    said: Sequence[Message] = ()
    past: Past | None = None
    if body.previous_response_id is not None:
        previous, said = await asyncio.to_thread(gateway.state.responses.open, caller.tenant, body.previous_response_id)
        past = _past(previous, body)
    new = new_messages(body)
    messages = [*said, *new]
    chat = await off_loop(size_of(messages, body.tools), partial(as_chat, body, messages))
    job = await gateway.jobs.chat(chat, caller, prefix="resp_", format_param="text.format")
    run = Run(gateway, caller, job, past=past)
    writer = ResponseWriter(job, body, run.explain, stored=body.store is not False)
    return _Answering(gateway, caller, body, new, run, writer)


def _past(previous: StoredResponse, body: ResponseBody) -> Past:
    """What is known of the conversation; instructions, which are not carried on, are its first message."""
    usage, before = previous.body["usage"], previous.body
    n_tokens = usage["total_tokens"] if isinstance(usage, dict) else 0
    edited_at = 0 if before["instructions"] != body.instructions else None
    return Past(n_tokens, edited_at, template_changed=before["tools"] != (body.tools or []))


@dataclass(frozen=True, slots=True)
class _Answering:
    """One response in the making."""

    gateway: Gateway
    caller: Caller
    body: ResponseBody
    new: list[Message]
    run: Run
    writer: ResponseWriter

    async def whole(self) -> Json:
        text, finish = "", None
        calls: list[ToolCall] = []
        async with aclosing(self.run.fragments()) as fragments:
            async for fragment in fragments:
                text += fragment.text
                calls += fragment.calls
                finish = fragment.finish
        assert finish is not None  # a reply without one has raised
        await self._keep(text, calls, finish)
        return self.writer.whole(text, calls, finish) | self.writer.told(finish)

    async def events(self) -> AsyncGenerator[bytes, None]:
        text: list[str] = []
        calls: list[ToolCall] = []
        began = False
        try:
            async with aclosing(self.run.fragments()) as fragments:
                async for fragment in fragments:
                    text.append(fragment.text)
                    calls += fragment.calls
                    event = b"" if began else self.writer.opening()
                    began = True
                    if fragment.text:
                        event += self.writer.delta(fragment.text)
                    if fragment.finish is not None:
                        await self._keep("".join(text), calls, fragment.finish)
                        event += self.writer.closing("".join(text), calls, fragment.finish)
                    yield event
        except Exception as error:
            if not began:
                raise  # it can still have a status of its own
            yield self.writer.failed(error)

    async def _keep(self, text: str, calls: Sequence[ToolCall], finish: Finish) -> None:
        if not self.writer.stored:
            return
        whole = self.writer.whole(text, calls, finish)
        messages = [*self.new, assistant_message(text, calls)]
        responses, previous = self.gateway.state.responses, self.body.previous_response_id
        try:
            await asyncio.to_thread(responses.add, self.caller.tenant, self.writer.response_id, whole, messages, previous)
        except (NotFound, RateLimited, SQLAlchemyError) as error:
            if self.body.store:
                raise
            level = logging.INFO if isinstance(error, RateLimited) else logging.WARNING
            _log.log(level, "a response that nobody asked to keep is not kept: %s", reason(error))
            self.writer.stored = False


def _json(value: object) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
