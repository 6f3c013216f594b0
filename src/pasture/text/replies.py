"""A request's token events -> the fragments of its text.

Joins the detokenizer and the stop scanner: a fragment's text can be shown at once, and the last fragment carries the finish.
A stop string ends the reply here: the events' generator is closed, which frees everything the request holds, and the finish
says `stop`. Log probabilities travel with the text of their token, so that the ones of text behind a stop string are dropped
with it.

Stands on `core` alone; the HTTP server and the Python interface both read replies through it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from time import monotonic

from pasture.core.errors import EngineError
from pasture.core.ports import Clock, Vocabulary
from pasture.core.values import Finish, FinishReason, TokenEvent, TokenLogprobs, Usage
from pasture.text.detokenizer import Detokenizer
from pasture.text.stops import StopScanner, StopStrings

TokenEvents = AsyncGenerator[TokenEvent, None]


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token with its log probabilities and the offset in the reply's text, in characters, at which it begins."""

    token: int
    logprobs: TokenLogprobs
    offset: int


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool that the model wants called."""

    call_id: str
    name: str
    arguments: str
    """a JSON object"""

    def as_json(self) -> dict[str, object]:
        """As messages of OpenAI's API have it."""
        return {"id": self.call_id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True)
class Fragment:
    """Text to append to the reply (may be empty), what was scored in it, and the end of the reply."""

    text: str
    scored: tuple[ScoredToken, ...] = ()
    finish: Finish | None = None
    calls: tuple[ToolCall, ...] = ()
    """complete ones, where somebody looks for them (`pasture.text.tool_calls`)"""


async def read_reply(
    events: TokenEvents, vocabulary: Vocabulary, stops: StopStrings, prompt_tokens: int, *, clock: Clock = monotonic
) -> AsyncGenerator[Fragment, None]:
    """Fragments until the one with a finish. Takes over `events` and closes it, however the reading ends.

    Raises what `events` raises, and the finish's own error when the reply ended in one.
    """
    reply = _Reply(vocabulary, stops, prompt_tokens, clock)
    async with aclosing(events):
        async for event in events:
            fragment = reply.take(event)
            if fragment is None:
                continue
            yield fragment
            if fragment.finish is not None:
                return
    raise EngineError("the reply ended without saying why")


class _Reply:
    """What is known of one reply so far."""

    __slots__ = (
        "_clock",
        "_detokenizer",
        "_n_tokens",
        "_piece",
        "_scanner",
        "_scored",
        "_seen_characters",
        "_shown_characters",
        "_start",
        "_usage",
    )

    def __init__(self, vocabulary: Vocabulary, stops: StopStrings, prompt_tokens: int, clock: Clock) -> None:
        self._clock = clock
        self._start = clock()
        self._piece = vocabulary.piece
        self._detokenizer = Detokenizer()
        self._scanner = StopScanner(stops) if stops else None
        self._scored: deque[ScoredToken] = deque()
        self._seen_characters = 0
        self._shown_characters = 0
        self._n_tokens = 0
        self._usage = Usage(prompt_tokens=prompt_tokens, cached_tokens=0, completion_tokens=0)

    def take(self, event: TokenEvent) -> Fragment | None:
        """The fragment that the event releases; None while everything is withheld."""
        if event.usage is not None:
            self._usage = event.usage
        text = ""
        if event.token is not None:
            text = self._detokenizer.push(self._piece(event.token))
            self._n_tokens += 1
            if event.logprobs is not None:
                self._scored.append(ScoredToken(event.token, event.logprobs, self._seen_characters))
        if event.finish is not None:
            return self._finish(text + self._detokenizer.finish(), event.finish)
        self._seen_characters += len(text)
        if not text:
            return None
        if self._scanner is not None:
            scanned = self._scanner.push(text)
            if scanned.stop is not None:
                return self._show(scanned.text, self._stopped())
            text = scanned.text
            if not text:
                return None
        return self._show(text)

    def _finish(self, text: str, finish: Finish) -> Fragment:
        if finish.error is not None:
            raise finish.error
        if self._scanner is not None:
            scanned = self._scanner.push(text)
            if scanned.stop is not None:
                return self._show(scanned.text, replace(finish, reason=FinishReason.STOP))
            text = scanned.text + self._scanner.finish()
        scored = tuple(self._scored)
        self._scored.clear()
        return Fragment(text, scored, finish)

    def _show(self, text: str, finish: Finish | None = None) -> Fragment:
        self._shown_characters += len(text)
        if not self._scored:
            return Fragment(text, (), finish)
        shown: list[ScoredToken] = []
        while self._scored and self._scored[0].offset < self._shown_characters:
            shown.append(self._scored.popleft())
        return Fragment(text, tuple(shown), finish)

    def _stopped(self) -> Finish:
        total_seconds = self._clock() - self._start
        return Finish(FinishReason.STOP, replace(self._usage, completion_tokens=self._n_tokens, total_seconds=total_seconds))
