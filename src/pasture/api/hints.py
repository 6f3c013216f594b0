"""`/v1/chat/prefetch`: a chat front end says that its user has begun to type, so that what is known already can be made ready.

For conversations that the client keeps, and for sessions. A hint is answered at once and costs nobody anything: its work is
done when there is no other. It counts against no limit, and changes no answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated

import orjson
from fastapi import APIRouter, Request
from pydantic import Field, JsonValue
from starlette.responses import Response

from pasture.api.answers import Hinted
from pasture.api.bodies import read_body
from pasture.api.callers import caller_of
from pasture.api.gateway import Gateway
from pasture.api.openapi import described
from pasture.api.schemas import SessionId, TemplateBody

MAX_DRAFT_CHARACTERS = 1 << 20


class HintBody(TemplateBody):
    """The chat so far, as `/v1/chat/completions` would get it, and what is typed of the next message."""

    model: str | None = None
    session_id: SessionId | None = None
    """whose messages come before those given here"""
    draft: Annotated[str, Field(max_length=MAX_DRAFT_CHARACTERS)] = ""
    """without one, a last message of the user's is taken for it"""

    @property
    def context(self) -> dict[str, object]:
        found = {"tools": self.tools, "tool_choice": self.tool_choice, "chat_template_kwargs": self.chat_template_kwargs}
        return {name: value for name, value in found.items() if value is not None}

    def split(self) -> tuple[list[dict[str, JsonValue]], str]:
        """The messages that are complete, and the draft."""
        if not self.draft and self.messages and _typed(self.messages[-1]) is not None:
            return self.messages[:-1], _typed(self.messages[-1]) or ""
        return self.messages, self.draft


def hint_routes(gateway: Gateway) -> APIRouter:
    """Routes over the gateway's service."""
    router = APIRouter()

    @router.post(
        "/v1/chat/prefetch",
        **described(
            "Generation",
            "Somebody types a chat's next message: make ready what is known of it",
            Hinted,
            body=HintBody,
            status=202,
            errors=(404, 503),
        ),
    )
    async def prefetch(request: Request) -> Response:
        body = await read_body(request, HintBody, gateway.settings.max_body_bytes)
        caller = caller_of(request, gateway.state)
        messages, draft = body.split()
        context = body.context
        if body.session_id is not None:
            session, said = await asyncio.to_thread(gateway.state.sessions.open, caller.tenant, body.session_id)
            messages = [*said, *messages]  # type: ignore[list-item]  # JSON, from the database
            context = {**session.context, **context}
        known, live = await gateway.expecting.typing(messages, context, draft, caller)
        answer = {"object": "chat.prefetch", "tokens": known, "cached_tokens": live}
        return Response(orjson.dumps(answer), 202, media_type="application/json")

    return router


def _typed(message: Mapping[str, JsonValue]) -> str | None:
    """What a user's message says, where it is text."""
    content = message.get("content")
    return content if message.get("role") == "user" and isinstance(content, str) else None
