"""A reply that outlives the replica that writes it: what was sent so far, and the request that asks for the rest.

    undisturbed     prompt ─► a b c d e f                      one leg
    with a loss     prompt ─► a b c ✗   prompt a b c ─► d e f   two legs, one stream

The rest is asked of another replica with the prompt and the tokens sent, the tokens left to draw, and the time that is left.
Penalties see the sent tokens as they would have; with a seed the random numbers go on where they were (mirostat's state begins
anew, and a request without a seed gets new randomness). Usage is the whole reply's: what was cached counts once, as the first
leg found it. Pure; one a request.
"""

from __future__ import annotations

from dataclasses import replace

from pasture.core.values import Finish, FinishReason, Phase, PhaseKind, Request, RequestId, TokenEvent, Usage


class Story:
    def __init__(self, request: Request, now: float) -> None:
        self.request = request
        self.sent: list[int] = []
        self._started_at = now
        self._first_token_at: float | None = None
        self._cached_tokens: int | None = None
        self._queue_seconds = 0.0
        self._n_swaps = 0
        self._legs = 0
        self._before_leg = 0
        self._leg_started_at = now
        self._phases: tuple[Phase, ...] = ()
        """of the legs that told theirs, in the whole reply's time"""

    def next_leg(self, now: float) -> Request | None:
        """What is left to ask for; None when every token was sent and only the end is missing."""
        request, n_sent = self.request, len(self.sent)
        self._before_leg = n_sent
        if n_sent and n_sent >= request.max_tokens:
            return None
        self._legs += 1
        self._leg_started_at = now
        if self._legs == 1:
            return request
        deadline = request.deadline_seconds
        return replace(
            request,
            request_id=RequestId(f"{request.request_id}~{self._legs}"),
            prompt=(*request.prompt, *self.sent),
            max_tokens=request.max_tokens - n_sent,
            drawn_tokens=request.drawn_tokens + n_sent,
            deadline_seconds=None if deadline is None else max(0.001, deadline - (now - self._started_at)),
        )

    def told(self, event: TokenEvent, now: float) -> TokenEvent:
        """The event as the client should see it; what it tells of a leg is put together with the legs before."""
        first = self._first_token_at is None and event.token is not None
        if first:
            self._first_token_at = now
        if self._cached_tokens is None and event.usage is not None:
            self._cached_tokens, self._queue_seconds = event.usage.cached_tokens, event.usage.queue_seconds
        if event.token is not None:
            self.sent.append(event.token)
        finish = event.finish
        if finish is None and event.usage is None:
            return event
        if finish is None and event.usage is not None:
            self._note(event.usage.phases)
        if finish is not None:
            finish = replace(finish, usage=self._concluded(finish.usage, now))
        usage = self._usage(len(self.sent), now) if first and event.usage is not None else None
        return replace(event, finish=finish, usage=usage)

    def ended(self, now: float) -> TokenEvent:
        """The end of a reply whose last token was sent, and whose replica was lost before it could say that it was the last."""
        return TokenEvent(None, finish=Finish(FinishReason.LENGTH, self._usage(len(self.sent), now)))

    def left(self, usage: Usage | None, now: float) -> Usage:
        """What it has cost when it ends here and the client is told nothing; `usage` is what its last leg says, if it does."""
        if usage is not None:
            return self._concluded(usage, now)
        found = self._usage(len(self.sent), now)
        return found if found.phases else replace(found, phases=(Phase(PhaseKind.QUEUE, 0.0, now - self._started_at, 0),))

    def _concluded(self, last: Usage, now: float) -> Usage:
        """The whole reply's, with what its last leg says at its end."""
        self._note(last.phases)
        if self._cached_tokens is None:
            self._cached_tokens, self._queue_seconds = last.cached_tokens, last.queue_seconds
        self._n_swaps += last.n_swaps
        return self._usage(self._before_leg + last.completion_tokens, now)

    def _usage(self, n_tokens: int, now: float) -> Usage:
        first = self._first_token_at if self._first_token_at is not None else now
        return Usage(
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self._cached_tokens or 0,
            completion_tokens=n_tokens,
            queue_seconds=self._queue_seconds,
            first_token_seconds=first - self._started_at,
            total_seconds=now - self._started_at,
            n_swaps=self._n_swaps,
            phases=self._phases,
        )

    def _note(self, phases: tuple[Phase, ...]) -> None:
        """What a leg says of itself, so far or at its end; its own clock begins with it."""
        begun = self._leg_started_at - self._started_at
        before = tuple(phase for phase in self._phases if phase.start_seconds < begun)
        self._phases = (
            *before,
            *(replace(p, start_seconds=p.start_seconds + begun, end_seconds=p.end_seconds + begun) for p in phases),
        )
