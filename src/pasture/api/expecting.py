"""The next turn, before anybody asks for it: the conversation as it will be rendered then, computed while nobody asks.

    answered     a reply is complete: its conversation will probably go on
    typing       somebody is writing the next message; what is written so far comes along

A chat template may show a reply differently once another message follows: reasoning is stripped, headers are added, blanks
trimmed. Then the cells that the reply left behind serve its conversation only up to that point, and the next turn would compute
all that follows, with its user waiting. The engine thread does it instead when it has nothing else to do; where nothing
differs, next to nothing is missing and it does nothing. Rendering and tokenizing take a core for some milliseconds too, so that
waits for the same moment, one conversation after the other. Event loop; long ones are rendered on a worker thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from pasture.api.callers import Caller
from pasture.api.jobs import Jobs
from pasture.api.schemas import ChatBody
from pasture.core.errors import PastureError
from pasture.core.ports import Service

_log = logging.getLogger("pasture.api")

MAX_WAITING = 32
"""conversations to be rendered; beyond that the server is busy enough, and the oldest is forgotten"""


class Expecting:
    """What was answered lately, and will probably go on."""

    def __init__(self, service: Service, jobs: Jobs, *, turn_ahead: bool, prefetch: bool) -> None:
        """`turn_ahead`: look ahead after replies; `prefetch`: follow hints of those who know."""
        self._service = service
        self._jobs = jobs
        self._turn_ahead = turn_ahead
        self._prefetch = prefetch
        self._answered: deque[tuple[ChatBody, Caller, Mapping[str, JsonValue]]] = deque(maxlen=MAX_WAITING)
        self._rendering: asyncio.Task[None] | None = None

    def answered(self, body: ChatBody, caller: Caller, reply: Mapping[str, JsonValue]) -> None:
        """`reply` is the complete answer to `body`, as a message; returns at once."""
        if self._turn_ahead:
            self._answered.append((body, caller, reply))
            if self._rendering is None or self._rendering.done():
                self._rendering = asyncio.create_task(self._render())

    @property
    def under_way(self) -> asyncio.Task[None] | None:
        """Ends when every turn that was waiting has been rendered."""
        return self._rendering

    async def typing(
        self, messages: Sequence[Mapping[str, JsonValue]], context: Mapping[str, object], draft: str, caller: Caller
    ) -> tuple[int, int]:
        """Have a conversation brought back, and computed as far as it is known; does not wait for it.

        Returns how many tokens are known of the next prompt, and how many of them are live now. Raises RequestError.
        """
        tokens = await self._jobs.upcoming(messages, context, draft)
        found = await self._service.locate(caller.namespace, tokens)
        if self._prefetch and len(tokens) < self._service.max_conversation_tokens:
            self._service.allow(caller.namespace, caller.allowance)
            self._service.anticipate(caller.namespace, tokens, typing=True)
        return len(tokens), found.live_tokens

    async def _render(self) -> None:
        while self._answered:
            await self._service.quiet()
            await self._expect(*self._answered.popleft())
            await asyncio.sleep(0)  # whoever has come meanwhile goes first

    async def _expect(self, body: ChatBody, caller: Caller, reply: Mapping[str, JsonValue]) -> None:
        messages: list[Mapping[str, JsonValue]] = [*body.messages, reply]
        fields = ("tools", "tool_choice", "chat_template_kwargs")
        context = {name: value for name in fields if (value := getattr(body, name)) is not None}
        try:
            tokens = await self._jobs.upcoming(messages, context)
        except PastureError as error:
            _log.debug("the next turn cannot be rendered: %s", error)
            return
        self._service.anticipate(caller.namespace, tokens)
