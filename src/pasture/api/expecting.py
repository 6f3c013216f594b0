"""The next turn, seen from the end of this one: the conversation as it will be rendered then, computed while nobody asks.

A chat template may show a reply differently once it is history: reasoning is stripped, headers are added, blanks trimmed. Then
the cells that the reply left behind serve its conversation only up to that point, and the next turn would compute all that
follows, with its user waiting. The engine thread does it instead when it has nothing else to do; where nothing differs, next to
nothing is missing and it does nothing. Event loop; rendering long conversations happens on a worker thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from pydantic import JsonValue

from pasture.api.callers import Caller
from pasture.api.jobs import Jobs
from pasture.api.schemas import ChatBody
from pasture.core.errors import PastureError
from pasture.core.ports import Service

_log = logging.getLogger("pasture.api")

MAX_AT_ONCE = 32
"""conversations being rendered; beyond that the server is busy enough, and nobody is waited for"""


class Expecting:
    """What was answered lately, and will probably go on."""

    def __init__(self, service: Service, jobs: Jobs, *, enabled: bool) -> None:
        self._service = service
        self._jobs = jobs
        self._enabled = enabled
        self._rendering: set[asyncio.Task[None]] = set()

    def answered(self, body: ChatBody, caller: Caller, reply: str) -> None:
        """`reply` is the complete answer to `body`; returns at once."""
        if self._enabled and len(self._rendering) < MAX_AT_ONCE:
            task = asyncio.create_task(self._expect(body, caller, reply))
            self._rendering.add(task)
            task.add_done_callback(self._rendering.discard)

    async def _expect(self, body: ChatBody, caller: Caller, reply: str) -> None:
        messages: list[Mapping[str, JsonValue]] = [*body.messages, {"role": "assistant", "content": reply}]
        fields = ("tools", "tool_choice", "chat_template_kwargs")
        context = {name: value for name in fields if (value := getattr(body, name)) is not None}
        try:
            tokens = await self._jobs.tokens(messages, context)
        except PastureError as error:
            _log.debug("the next turn cannot be rendered: %s", error)
            return
        self._service.anticipate(caller.namespace, tokens)
