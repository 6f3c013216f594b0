"""One job on its way through: past its tenant's turnstile, to the service, and at the end into its session.

Whatever ends the reading (the client's departure, an error, the last token) gives the place at the turnstile and in the session
back. Tokens are counted as they come, so that a reply that was cut off is paid for as far as it went.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from functools import partial

from pasture.api.callers import Caller
from pasture.api.explanations import Past, explain
from pasture.api.formats import Json, Reply, Writer
from pasture.api.gateway import Gateway
from pasture.api.jobs import Choice, Job
from pasture.api.joining import Joined
from pasture.api.schemas import ChatBody
from pasture.api.streams import OnComplete, chunks, collect
from pasture.core.errors import DeadlineExceeded, RequestError
from pasture.core.values import TokenEvent, Usage, Whereabouts
from pasture.sessions.gate import Passage
from pasture.text.replies import Fragment, read_reply
from pasture.text.tool_calls import assistant_message, read_calls

PROBABLE_REPLY_TOKENS = 512
"""set aside for a reply that may be longer, until it is known how long it is"""


class Run:
    """A job with whose it is, and the session that it is in."""

    def __init__(
        self,
        gateway: Gateway,
        caller: Caller,
        job: Job,
        joined: Joined | None = None,
        chat: ChatBody | None = None,
        past: Past | None = None,
    ) -> None:
        """`chat`: what the job answers, where that is a conversation that may go on. `past`: where that is no session's."""
        self.job = job
        self._chat = chat
        self._gateway = gateway
        self._caller = caller
        self._joined = joined
        self._past = past if joined is None else joined.past
        self._before: dict[tuple[int, ...], tuple[Whereabouts, int]] = {}

    async def collect(self) -> list[Reply]:
        """Every choice's reply, complete, and kept in the session. Raises what ends any of them early."""
        async with self._gateway.members.held(self._joined):
            async with self._enter() as passage:
                await self._locate()
                replies = await collect(self.job, partial(self._read, passage))
            await self._keep(replies)
        return replies

    async def chunks(self, writer: Writer) -> AsyncGenerator[bytes, None]:
        """The events of a stream, as bytes."""
        keep: OnComplete | None = self._keep if self._joined is not None or self._chat is not None else None
        async with (
            self._gateway.members.held(self._joined),
            self._enter() as passage,
            aclosing(chunks(self.job, partial(self._read, passage), writer, keep)) as events,
        ):
            await self._locate()
            async for event in events:
                yield event

    def explain(self, index: int, usage: Usage) -> Json:
        """Where a choice's prompt was when it was submitted, and why the rest of it had to be computed."""
        prompt = self.job.choices[index].request.prompt
        found, n_asked = self._before[prompt]
        return explain(usage, found, n_asked, self._past)

    async def fragments(self) -> AsyncGenerator[Fragment, None]:
        """The reply of the first choice, piece by piece, for answers in other shapes."""
        async with (
            self._enter() as passage,
            aclosing(self._read(passage, self.job.choices[0])) as fragments,
        ):
            await self._locate()
            async for fragment in fragments:
                yield fragment

    async def _locate(self) -> None:
        """Note each prompt; for those who asked: where it is, before anything is done about it."""
        service, namespace = self._gateway.service, self._caller.namespace
        for prompt in {choice.request.prompt for choice in self.job.choices}:
            n_asked = self._gateway.asked.note(namespace, prompt)
            if self.job.include_pasture:
                self._before[prompt] = await service.locate(namespace, prompt, deep=True), n_asked

    def _enter(self) -> AbstractAsyncContextManager[Passage]:
        """A place for each reply, and what they will probably use."""
        choices = self.job.choices
        prompts = sum(len(choice.request.prompt) for choice in choices[:: self.job.n_per_prompt])
        replies = sum(min(choice.request.max_tokens, PROBABLE_REPLY_TOKENS) for choice in choices)
        return self._gateway.state.gate.enter(self._caller.tenant, replies=len(choices), tokens=prompts + replies)

    def _read(self, passage: Passage, choice: Choice) -> AsyncGenerator[Fragment, None]:
        gateway = self._gateway
        record = gateway.settings.tracing.record(choice.request)
        events = gateway.service.generate(choice.request, record.on_end)
        if self._caller.tenant.limits.tokens_per_minute is not None:
            first = choice.index % self.job.n_per_prompt == 0  # `usage` counts a prompt once, however many replies it has
            events = _counted(events, passage, len(choice.request.prompt) if first else 0)
        timed = gateway.metrics.observed(record.observed(events), gateway.clock)
        vocabulary, stops, dialect = gateway.service.vocabulary, self.job.stops, self.job.dialect
        reply = read_reply(timed, vocabulary, stops, len(choice.request.prompt), clock=gateway.clock)
        return reply if dialect is None else read_calls(reply, dialect)

    async def _keep(self, replies: Sequence[Reply]) -> None:
        reply, finish = assistant_message("".join(replies[0].text), replies[0].calls), replies[0].finish
        assert finish is not None  # a reply without one has raised
        if self._joined is not None:
            session_id = await self._joined.go_on(reply, finish)
            if session_id is not None:
                self._gateway.pinned.went_on(self._caller.tenant, session_id)
        if self._chat is not None and len(replies) == 1:
            self._gateway.expecting.answered(self._chat, self._caller, reply)


async def _counted(
    events: AsyncGenerator[TokenEvent, None], passage: Passage, prompt_tokens: int
) -> AsyncGenerator[TokenEvent, None]:
    """The same events; the passage pays for every token, and for the prompt unless the scheduler refused it.

    Who leaves before the first token pays as well: the prompt may have been computed by then.
    """
    due = prompt_tokens
    async with aclosing(events):
        try:
            async for event in events:
                passage.pay(due + (event.token is not None))
                due = 0
                yield event
        except RequestError as error:
            if not isinstance(error, DeadlineExceeded):
                due = 0
            raise
        finally:
            passage.pay(due)
