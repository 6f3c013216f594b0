"""The routes that generate: `/v1/chat/completions` and `/v1/completions`."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from fastapi import APIRouter, Request
from starlette.responses import Response

from pasture.api.bodies import read_body
from pasture.api.disconnect import cancelled_on_disconnect
from pasture.api.formats import ChatShape, CompletionShape, Shape, Writer
from pasture.api.gateway import Gateway
from pasture.api.jobs import Choice, Job
from pasture.api.schemas import ChatBody, CompletionBody
from pasture.api.streams import EventStream, chunks, collect
from pasture.text.replies import Fragment, read_reply


def generation_routes(gateway: Gateway) -> APIRouter:
    """Routes over the gateway's service."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = await read_body(request, ChatBody, gateway.settings.max_body_bytes)
        return await _answer(gateway, await gateway.jobs.chat(body, caller(request)), ChatShape(), request)

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await read_body(request, CompletionBody, gateway.settings.max_body_bytes)
        return await _answer(gateway, await gateway.jobs.completion(body, caller(request)), CompletionShape(), request)

    return router


def caller(request: Request) -> str:
    """Whose turn a request takes when it names no user: the key's digest, else the client's address."""
    key = request.scope.get("pasture.key")
    if isinstance(key, str):
        return f"key:{key}"
    return "anonymous" if request.client is None else request.client.host


async def _answer(gateway: Gateway, job: Job, shape: Shape, request: Request) -> Response:
    service = gateway.service
    writer = Writer(job, shape, service.vocabulary)

    def read(choice: Choice) -> AsyncGenerator[Fragment, None]:
        events = gateway.metrics.observed(service.generate(choice.request), gateway.clock)
        return read_reply(events, service.vocabulary, job.stops, len(choice.request.prompt), clock=gateway.clock)

    if job.stream:
        return EventStream(chunks(job, read, writer))
    async with cancelled_on_disconnect(request.receive):
        replies = await collect(job, read)
    return Response(writer.complete(replies), media_type="application/json")
