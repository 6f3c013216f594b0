"""Replies in OpenAI's two shapes, `chat.completion` and `text_completion`, whole and as chunks of a stream.

A stream's chunks differ in one string, so all around it is rendered once a choice and only the text is encoded a chunk: no
object is built and no model validated for a token. Chunks are complete server-sent events, as bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Protocol

import orjson

from pasture.api.jobs import Choice, Job
from pasture.core.errors import ShuttingDown
from pasture.core.ports import Vocabulary
from pasture.core.values import Finish, FinishReason, Usage
from pasture.text.replies import Fragment, ScoredToken, ToolCall
from pasture.text.tool_calls import assistant_message

Json = dict[str, object]

Explain = Callable[[int, Usage], Json]
"""(index of the choice, what it cost) -> where its prompt came from"""

_NEVER = -9999.0

DONE = b"data: [DONE]\n\n"
FINGERPRINT = f"pasture-{version('pasture')}"

_TEXT = "\ue000text\ue000"
_TEXT_MARK = orjson.dumps(_TEXT)
_SCORES = "\ue000scores\ue000"
_SCORES_MARK = orjson.dumps(_SCORES)


@dataclass(slots=True)
class Reply:
    """A choice, collected."""

    choice: Choice
    text: list[str] = field(default_factory=list)
    scored: list[ScoredToken] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, fragment: Fragment) -> None:
        self.text.append(fragment.text)
        self.scored.extend(fragment.scored)
        self.calls.extend(fragment.calls)
        self.finish = fragment.finish


class Shape(Protocol):
    """What differs between the two kinds of answer."""

    whole: str
    """`object` of a complete answer"""
    chunk: str
    """`object` of a chunk"""

    def message(self, text: str, calls: Sequence[ToolCall]) -> Json:
        """A choice's text and calls, complete."""
        ...

    def opening(self, choice: Choice) -> Json | None:
        """What a choice's stream begins with, if anything comes before its text."""
        ...

    def delta(self, text: str) -> Json: ...
    def closing(self) -> Json: ...
    def scores(self, scored: Sequence[ScoredToken], vocabulary: Vocabulary, offset: int) -> object:
        """Log probabilities; `offset`: characters before the reply's own text."""
        ...


class ChatShape:
    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def message(self, text: str, calls: Sequence[ToolCall]) -> Json:
        return {"message": {**assistant_message(text, calls), "refusal": None}}

    def opening(self, choice: Choice) -> Json | None:
        return {"delta": {"role": "assistant", "content": ""}}

    def delta(self, text: str) -> Json:
        return {"delta": {"content": text}}

    def closing(self) -> Json:
        return {"delta": {}}

    def scores(self, scored: Sequence[ScoredToken], vocabulary: Vocabulary, offset: int) -> object:
        return {"content": [self._score(one, vocabulary) for one in scored], "refusal": None}

    def _score(self, one: ScoredToken, vocabulary: Vocabulary) -> Json:
        top = [_token(token, logprob, vocabulary) for token, logprob in one.logprobs.top]
        return {**_token(one.token, one.logprobs.logprob, vocabulary), "top_logprobs": top}


class CompletionShape:
    whole = "text_completion"
    chunk = "text_completion"

    def message(self, text: str, calls: Sequence[ToolCall]) -> Json:
        return {"text": text}

    def opening(self, choice: Choice) -> Json | None:
        return {"text": choice.echo} if choice.echo else None

    def delta(self, text: str) -> Json:
        return {"text": text}

    def closing(self) -> Json:
        return {"text": ""}

    def scores(self, scored: Sequence[ScoredToken], vocabulary: Vocabulary, offset: int) -> object:
        return {
            "tokens": [_show(one.token, vocabulary) for one in scored],
            "token_logprobs": [_finite(one.logprobs.logprob) for one in scored],
            "top_logprobs": [{_show(token, vocabulary): _finite(lp) for token, lp in one.logprobs.top} for one in scored],
            "text_offset": [offset + one.offset for one in scored],
        }


class Writer:
    """Renders one job's answer."""

    def __init__(self, job: Job, shape: Shape, vocabulary: Vocabulary, explain: Explain | None = None) -> None:
        """`explain`: what `pasture.cache` says of a choice, for requests that ask for it."""
        self._job = job
        self._explain = explain
        self._shape = shape
        self._vocabulary = vocabulary
        self._chunks = [_ChunkFrame(self, choice) for choice in job.choices]
        self._n_calls = [0] * len(job.choices)

    def first(self, index: int) -> bytes:
        """What the choice's stream begins with; may be nothing."""
        opening = self._shape.opening(self._job.choices[index])
        return b"" if opening is None else self._event([self._entry(index, opening)])

    def next(self, index: int, fragment: Fragment) -> bytes:
        """A fragment, and the choice's end where the fragment is the last."""
        frame = self._chunks[index]
        text = frame.head + orjson.dumps(fragment.text) + frame.tail if fragment.text or fragment.scored else b""
        if fragment.scored:
            choice = self._job.choices[index]
            scores = self._shape.scores(fragment.scored, self._vocabulary, len(choice.echo))
            text = frame.head + orjson.dumps(fragment.text) + frame.scored_tail.replace(_SCORES_MARK, orjson.dumps(scores))
        for call in fragment.calls:
            delta: Json = {"delta": {"tool_calls": [{"index": self._n_calls[index], **call.as_json()}]}}
            text += self._event([self._entry(index, delta)])
            self._n_calls[index] += 1
        if fragment.finish is None:
            return text
        reason = _chat_reason(fragment.finish, self._n_calls[index])
        return text + self._event([self._entry(index, self._shape.closing(), reason=reason)])

    def last(self, finishes: Mapping[int, Finish]) -> bytes:
        """Usage where it was asked for, and the end of the stream."""
        extra: Json = {}
        if self._job.include_usage:
            extra["usage"] = self._usage(finishes)
        if self._job.include_pasture:
            extra["pasture"] = timings(finishes, self._explain)
        return (self._event([], extra) if extra else b"") + DONE

    def complete(self, replies: Sequence[Reply]) -> bytes:
        """The whole answer as JSON."""
        entries = []
        finishes: dict[int, Finish] = {}
        for reply in replies:
            assert reply.finish is not None  # a reply without one has raised
            finishes[reply.choice.index] = reply.finish
            scores = None
            if reply.choice.request.n_logprobs is not None:
                scores = self._shape.scores(reply.scored, self._vocabulary, len(reply.choice.echo))
            message = self._shape.message(reply.choice.echo + "".join(reply.text), reply.calls)
            entries.append(self._entry(reply.choice.index, message, scores, _chat_reason(reply.finish, len(reply.calls))))
        body = self._envelope(self._shape.whole, entries) | {"usage": self._usage(finishes)}
        if self._job.include_pasture:
            body["pasture"] = timings(finishes, self._explain)
        return orjson.dumps(body)

    def frame(self, index: int) -> bytes:
        """A chunk with marks where text and log probabilities go."""
        return self._event([self._entry(index, self._shape.delta(_TEXT), _SCORES)])

    def _event(self, entries: Sequence[Json], extra: Mapping[str, object] | None = None) -> bytes:
        usage: Json = {"usage": None} if self._job.include_usage else {}
        body = self._envelope(self._shape.chunk, entries) | usage | dict(extra or {})
        return b"data: " + orjson.dumps(body) + b"\n\n"

    def _envelope(self, kind: str, entries: Sequence[Json]) -> Json:
        job = self._job
        return {
            "id": job.job_id,
            "object": kind,
            "created": job.created,
            "model": job.model,
            "system_fingerprint": FINGERPRINT,
            "choices": entries,
        }

    def _entry(self, index: int, content: Json, scores: object = None, reason: str | None = None) -> Json:
        return {"index": index, **content, "logprobs": scores, "finish_reason": reason}

    def _usage(self, finishes: Mapping[int, Finish]) -> Json:
        """Each prompt counts once, however many choices continue it; cached is what the call found when it came."""
        usages = [finishes[i].usage for i in sorted(finishes)]
        n = self._job.n_per_prompt
        prompts = [usages[i : i + n] for i in range(0, len(usages), n)]
        prompt_tokens = sum(group[0].prompt_tokens for group in prompts)
        completion_tokens = sum(usage.completion_tokens for usage in usages)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(min(u.cached_tokens for u in group) for group in prompts)},
        }


class _ChunkFrame:
    """The constant bytes around a choice's text."""

    __slots__ = ("head", "scored_tail", "tail")

    def __init__(self, writer: Writer, choice: Choice) -> None:
        self.head, self.scored_tail = writer.frame(choice.index).split(_TEXT_MARK)
        self.tail = self.scored_tail.replace(_SCORES_MARK, b"null")


def wire_reason(finish: Finish) -> str:
    """`stop` or `length`. Raises ShuttingDown for a reply that the server cut off."""
    if finish.reason is FinishReason.CANCELLED:
        raise ShuttingDown("the server stopped before the reply was complete")
    return finish.reason.value


def _chat_reason(finish: Finish, n_calls: int) -> str:
    """As `wire_reason`; a reply that ended with calls waits for what they return."""
    reason = wire_reason(finish)
    return "tool_calls" if n_calls and reason == FinishReason.STOP else reason


def timings(finishes: Mapping[int, Finish], explain: Explain | None) -> Json:
    """The object `pasture` of an answer: where each choice's time and prompt came from."""
    told: list[Json] = []
    for i in sorted(finishes):
        usage = finishes[i].usage
        cache: Json = {} if explain is None else {"cache": explain(i, usage)}
        told.append(_timing(i, usage) | cache)
    return {"choices": told}


def _timing(index: int, usage: Usage) -> Json:
    return {
        "index": index,
        "queue_seconds": usage.queue_seconds,
        "first_token_seconds": usage.first_token_seconds,
        "total_seconds": usage.total_seconds,
        "cached_tokens": usage.cached_tokens,
        "swaps": usage.n_swaps,
    }


def _show(token: int, vocabulary: Vocabulary) -> str:
    return vocabulary.piece(token, special=True).decode("utf-8", errors="replace")


def _finite(logprob: float) -> float:
    # JSON has no infinity; OpenAI's API says -9999 for "never"
    return max(logprob, _NEVER)


def _token(token: int, logprob: float, vocabulary: Vocabulary) -> Json:
    piece = vocabulary.piece(token, special=True)
    return {"token": piece.decode("utf-8", errors="replace"), "logprob": _finite(logprob), "bytes": list(piece)}
