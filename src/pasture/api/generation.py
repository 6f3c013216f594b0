"""The routes that generate: `/v1/chat/completions` and `/v1/completions`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from pasture.api.answers import ChatCompletion, TextCompletion
from pasture.api.bodies import read_body
from pasture.api.callers import caller_of
from pasture.api.disconnect import cancelled_on_disconnect
from pasture.api.formats import ChatShape, CompletionShape, Shape, Writer
from pasture.api.gateway import Gateway
from pasture.api.openapi import GENERATES, described
from pasture.api.runs import Run
from pasture.api.schemas import ChatBody, CompletionBody
from pasture.api.streams import EventStream

_ERRORS = (404, *GENERATES)
_HEADERS = ("X-Session-Id", "X-Priority")


def generation_routes(gateway: Gateway) -> APIRouter:
    """Routes over the gateway's service."""
    router = APIRouter()

    @router.post(
        "/v1/chat/completions",
        **described(
            "Generation",
            "A chat's next message, streamed or whole",
            ChatCompletion,
            body=ChatBody,
            errors=_ERRORS,
            streams=True,
            headers=_HEADERS,
        ),
    )
    async def chat_completions(request: Request) -> Response:
        body = await read_body(request, ChatBody, gateway.settings.max_body_bytes)
        caller = caller_of(request, gateway.state)
        body, joined = await gateway.members.join(body, caller, request.headers.get("x-session-id"))
        job = await gateway.jobs.chat(body, caller)
        return await _answer(gateway, Run(gateway, caller, job, joined, body), ChatShape(), request)

    @router.post(
        "/v1/completions",
        **described(
            "Generation",
            "A text's continuation, streamed or whole",
            TextCompletion,
            body=CompletionBody,
            errors=_ERRORS,
            streams=True,
            headers=_HEADERS,
        ),
    )
    async def completions(request: Request) -> Response:
        body = await read_body(request, CompletionBody, gateway.settings.max_body_bytes)
        caller = caller_of(request, gateway.state)
        job = await gateway.jobs.completion(body, caller)
        return await _answer(gateway, Run(gateway, caller, job), CompletionShape(), request)

    return router


async def _answer(gateway: Gateway, run: Run, shape: Shape, request: Request) -> Response:
    writer = Writer(run.job, shape, gateway.service.vocabulary, run.explain)
    if run.job.stream:
        return EventStream(run.chunks(writer))
    async with cancelled_on_disconnect(request.receive):
        replies = await run.collect()
    return Response(writer.complete(replies), media_type="application/json")
