"""Public prefixes at work: declared texts as tokens, their KV computed once in the public namespace and kept in RAM.

How much of a prompt is public is how far it agrees with a declared text, token by token: what agrees is known to everybody.
The list is read again every `FRESH_SECONDS` while requests come; nobody waits for that. Belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from contextlib import aclosing
from functools import partial

from sqlalchemy.exc import SQLAlchemyError

from pasture.api.offload import off_loop
from pasture.core.errors import PastureError, PromptTooLong
from pasture.core.ports import Clock, Service
from pasture.core.storage import Pin
from pasture.core.values import PUBLIC_NAMESPACE, Request, RequestId
from pasture.sessions.public import PublicPrefix, PublicPrefixes
from pasture.text.prompts import Prompts

_log = logging.getLogger("pasture.api")

FRESH_SECONDS = 2.0


class Publics:
    """The declared prefixes of one app."""

    def __init__(self, service: Service, declared: PublicPrefixes, prompts: Prompts, clock: Clock) -> None:
        self._service = service
        self._declared = declared
        self._prompts = prompts
        self._clock = clock
        self._tokens: dict[PublicPrefix, tuple[int, ...]] = {}
        self._pins: dict[PublicPrefix, Pin] = {}
        self._read_at = -FRESH_SECONDS
        self._reading: asyncio.Task[None] | None = None

    def common(self, prompt: Sequence[int]) -> int:
        """How many tokens from its beginning a prompt has in common with a declared text."""
        if self._clock() - self._read_at >= FRESH_SECONDS and (self._reading is None or self._reading.done()):
            self._reading = asyncio.create_task(self.refresh())
        return max((_common(tokens, prompt) for tokens in self._tokens.values()), default=0)

    async def refresh(self) -> None:
        """Take up what was declared or withdrawn since the last time."""
        self._read_at = self._clock()
        try:
            found = await asyncio.to_thread(self._declared.all)
        except (SQLAlchemyError, PastureError) as error:
            _log.warning("public prefixes cannot be read: %s", error)
            return
        for prefix in self._tokens.keys() - set(found):
            del self._tokens[prefix]
            if pin := self._pins.pop(prefix, None):
                pin.release()
        for prefix in found:
            if prefix not in self._tokens:
                try:
                    await self._take_up(prefix)
                except PastureError as error:
                    _log.warning("the public prefix %s cannot be used: %s", prefix.name, error)

    async def _take_up(self, prefix: PublicPrefix) -> None:
        text = prefix.content
        if prefix.role is not None:
            message = {"role": prefix.role, "content": prefix.content}
            text = self._prompts.template.render([message], add_generation_prompt=False)
        tokens = await off_loop(len(text), partial(self._prompts.text, text))
        self._tokens[prefix] = tokens
        request = Request(
            RequestId("public-" + secrets.token_hex(12)), tokens, 0, namespace=PUBLIC_NAMESPACE, tenant="public", priority=-1
        )
        try:
            async with aclosing(self._service.generate(request)) as events:
                async for event in events:
                    if event.finish is not None and event.finish.error is not None:
                        raise event.finish.error
            self._pins[prefix] = await self._service.pin(PUBLIC_NAMESPACE, tokens)
        except PromptTooLong:
            raise  # it would be refused the next time as well
        except BaseException:
            self._tokens.pop(prefix, None)  # to be tried again
            raise


def _common(one: Sequence[int], two: Sequence[int]) -> int:
    if not one or one[0] != two[0]:
        return 0
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
