from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable

import pytest

from pasture.core.errors import DeadlineExceeded, EngineError
from pasture.core.values import Finish, FinishReason, TokenEvent, TokenLogprobs, Usage
from pasture.text.replies import Fragment, read_reply
from pasture.text.stops import StopStrings
from tests.unit.stub_service import EOS, ByteVocabulary, events_of


class Events:
    """Scripted events that know whether their generator was closed and how many were taken."""

    def __init__(self, events: Iterable[TokenEvent]) -> None:
        self._events = events
        self.taken = 0
        self.closed = False

    async def generate(self) -> AsyncGenerator[TokenEvent, None]:
        try:
            for event in self._events:
                self.taken += 1
                yield event
        finally:
            self.closed = True


async def read(events: Events, *stops: str) -> list[Fragment]:
    clock = iter(range(100))
    reply = read_reply(events.generate(), ByteVocabulary(), StopStrings.of(stops), 10, clock=lambda: float(next(clock)))
    return [fragment async for fragment in reply]


async def test_fragments_join_to_the_reply_and_the_last_carries_the_finish() -> None:
    fragments = await read(Events(events_of("Grüße".encode(), reason=FinishReason.LENGTH)))
    assert [fragment.text for fragment in fragments] == ["G", "r", "ü", "ß", "e", ""]
    assert fragments[-1].finish == Finish(FinishReason.LENGTH, Usage(10, 4, 7))


async def test_control_tokens_show_nothing() -> None:
    assert "".join(fragment.text for fragment in await read(Events(events_of([*b"a", EOS, *b"b"])))) == "ab"


async def test_a_stop_string_ends_the_request_and_its_finish_is_made_here() -> None:
    events = Events([TokenEvent(97, usage=Usage(10, 6, 1, queue_seconds=0.25)), *events_of(b"b--ccc")])
    fragments = await read(events, "--")
    assert "".join(fragment.text for fragment in fragments) == "ab"
    assert fragments[-1].finish == Finish(FinishReason.STOP, Usage(10, 6, 4, queue_seconds=0.25, total_seconds=1.0))
    assert events.closed
    assert events.taken == 4


async def test_a_stop_string_in_the_last_event_wins_over_the_length() -> None:
    finish = Finish(FinishReason.LENGTH, Usage(10, 0, 2))
    fragments = await read(Events([TokenEvent(97), TokenEvent(46, finish=finish)]), ".")
    assert fragments[-1] == Fragment("", (), Finish(FinishReason.STOP, finish.usage))


async def test_text_withheld_for_a_stop_string_comes_with_the_finish() -> None:
    fragments = await read(Events(events_of(b"a-")), "--")
    assert [fragment.text for fragment in fragments] == ["a", "-"]


async def test_half_a_character_at_the_end_is_replaced() -> None:
    fragments = await read(Events(events_of(b"a\xc3")))
    assert [fragment.text for fragment in fragments] == ["a", "\ufffd"]


async def test_log_probabilities_come_with_their_tokens_text() -> None:
    scores = TokenLogprobs(-1.0, ())
    tokens = [TokenEvent(token, scores) for token in "aé-b".encode()]
    fragments = await read(Events([*tokens, *events_of([])]), "-x")
    shown = [(fragment.text, [(one.token, one.offset) for one in fragment.scored]) for fragment in fragments]
    assert shown == [("a", [(97, 0)]), ("é", [(0xC3, 1), (0xA9, 1)]), ("-b", [(45, 2), (98, 3)]), ("", [])]


async def test_log_probabilities_behind_a_stop_string_are_dropped() -> None:
    scores = TokenLogprobs(-1.0, ())
    fragments = await read(Events([TokenEvent(token, scores) for token in b"ab--"]), "--")
    assert [one.token for fragment in fragments for one in fragment.scored] == [97, 98]


async def test_an_error_in_the_finish_is_raised() -> None:
    finish = Finish(FinishReason.ERROR, Usage(10, 0, 1), DeadlineExceeded("too late"))
    with pytest.raises(DeadlineExceeded, match="too late"):
        await read(Events([TokenEvent(97), TokenEvent(None, finish=finish)]))


async def test_events_that_just_end_are_an_error() -> None:
    with pytest.raises(EngineError, match="without saying why"):
        await read(Events([TokenEvent(97)]))


async def test_closing_the_reply_closes_the_request() -> None:
    events = Events(events_of(b"abc"))
    reply = read_reply(events.generate(), ByteVocabulary(), StopStrings(), 10)
    await anext(reply)
    await reply.aclose()
    assert events.closed
