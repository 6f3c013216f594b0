"""A service without a scheduler, for the tests of text and HTTP: every byte is a token, and replies are scripted.

What a request would need of a real service is recorded, so that tests can look at the requests that reached it and at how
they ended.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pasture.core.errors import InvariantBroken
from pasture.core.ports import OnEnd
from pasture.core.statistics import (
    PoolStatistics,
    PrefixContent,
    SchedulerStatistics,
    SequenceState,
    SequenceStatistics,
    ServiceStatistics,
    Verification,
)
from pasture.core.storage import PrefetchStatistics, StoreStatistics, TierStatistics
from pasture.core.values import (
    DEFAULT_NAMESPACE,
    Allowance,
    Finish,
    FinishReason,
    Form,
    ModelInfo,
    Namespace,
    PoolShape,
    Request,
    RequestId,
    SeqId,
    TokenEvent,
    TokenLogprobs,
    Usage,
    Whereabouts,
)

BOS, EOS = 256, 257
SPECIAL = {"<s>": BOS, "</s>": EOS, "<|im_start|>": 258, "<|im_end|>": 259}

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

MODEL = ModelInfo("stub-model", "/models/stub.gguf", "stub", "a stub", 1000, 2000, 260, 2, 4096, 16, True)


@dataclass
class ByteVocabulary:
    """Token n is the byte n; a few special tokens follow."""

    chat_template: str | None = CHAT_TEMPLATE
    add_bos: bool = False
    n_tokens: int = 256 + len(SPECIAL)
    end_tokens: frozenset[int] = frozenset({EOS, SPECIAL["<|im_end|>"]})
    bos: int | None = BOS
    eos: int | None = EOS

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        tokens = [BOS] if add_special and self.add_bos else []
        while text:
            special = next((name for name in SPECIAL if text.startswith(name)), None) if parse_special else None
            if special is not None:
                tokens.append(SPECIAL[special])
                text = text[len(special) :]
            else:
                tokens.extend(text[0].encode())
                text = text[1:]
        return tokens

    def piece(self, token: int, *, special: bool = False) -> bytes:
        if token < 256:
            return bytes([token])
        return next(name for name, value in SPECIAL.items() if value == token).encode() if special else b""


@dataclass
class StubPin:
    of: tuple[str, tuple[int, ...]]
    released: bool = False

    def release(self) -> None:
        self.released = True


@dataclass
class StubService:
    """Answers every request with `reply`, a byte a token, or with what `script` makes of it."""

    reply: str | bytes = "Hello there"
    ready: bool = True
    alive: bool = True
    error: Exception | None = None
    """raised before the first event"""
    script: Callable[[Request], AsyncGenerator[TokenEvent, None]] | None = None
    hold: asyncio.Event | None = None
    """where given, a reply stops after its first token until it is set"""
    still: asyncio.Event | None = None
    """where given, requests seem to be open until it is set"""
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    """set with the first request"""
    max_conversation_tokens: int = 1000
    vocabulary: ByteVocabulary = field(default_factory=ByteVocabulary)
    model: ModelInfo = MODEL
    requests: list[Request] = field(default_factory=list)
    open: int = 0
    """generators that have begun and not ended"""
    found: Whereabouts | None = None
    """where every prompt is"""
    contents: dict[int, PrefixContent] = field(default_factory=dict)
    """what prefixes say, by number"""
    pins: list[StubPin] = field(default_factory=list)
    restored: list[tuple[str, tuple[int, ...], bytes]] = field(default_factory=list)
    broken: bool = False
    drained: bool = False
    closed: bool = False
    anticipated: list[tuple[int, ...]] = field(default_factory=list)
    typed: list[tuple[int, ...]] = field(default_factory=list)
    """of those, what somebody is typing"""
    allowed: dict[Namespace, Allowance] = field(default_factory=dict)
    """what namespaces may hold, as far as anybody said"""
    kept_for: dict[Namespace, float] | None = None
    """how long their KV is kept; None: nobody said"""
    lifted: list[tuple[int, ...]] = field(default_factory=list)
    """what was to be brought into RAM"""

    async def generate(self, request: Request, on_end: OnEnd | None = None) -> AsyncGenerator[TokenEvent, None]:
        self.requests.append(request)
        if self.error is not None:
            raise self.error
        self.open += 1
        self.begun.set()
        try:
            events = self._scripted(request) if self.script is None else self.script(request)
            async for event in events:
                yield event
        finally:
            self.open -= 1

    async def _scripted(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        data = self.reply.encode() if isinstance(self.reply, str) else self.reply
        shown = data[: request.max_tokens]
        for i, token in enumerate(shown):
            if i == 1 and self.hold is not None:
                await self.hold.wait()
            usage = Usage(len(request.prompt), 3, 1) if i == 0 else None
            yield TokenEvent(token, self._scores(request, token), usage=usage)
        reason = FinishReason.LENGTH if len(data) > request.max_tokens else FinishReason.STOP
        yield TokenEvent(None, finish=Finish(reason, Usage(len(request.prompt), 3, len(shown))))

    def _scores(self, request: Request, token: int) -> TokenLogprobs | None:
        if request.n_logprobs is None:
            return None
        return TokenLogprobs(-0.5, tuple((token - i, -0.5 - i) for i in range(request.n_logprobs)))

    async def locate(self, namespace: Namespace, tokens: Sequence[int], *, deep: bool = False) -> Whereabouts:
        found = self.found or Whereabouts(len(tokens), 2, 5)
        return found if deep else dataclasses.replace(found, slow_tokens={})

    async def open_prefix(self, number: int, n_tokens: int) -> PrefixContent | None:
        content = self.contents.get(number)
        return None if content is None else dataclasses.replace(content, tokens=content.tokens[:n_tokens])

    def allow(self, namespace: Namespace, allowance: Allowance) -> None:
        self.allowed[namespace] = allowance

    def keep_for(self, seconds: Mapping[Namespace, float]) -> None:
        self.kept_for = dict(seconds)

    async def pin(self, namespace: Namespace, tokens: Sequence[int]) -> StubPin:
        self.pins.append(StubPin((namespace, tuple(tokens))))
        return self.pins[-1]

    async def quiet(self) -> None:
        if self.still is not None:
            await self.still.wait()

    def anticipate(self, namespace: Namespace, tokens: Sequence[int], *, typing: bool = False) -> None:
        self.anticipated.append(tuple(tokens))
        if typing:
            self.typed.append(tuple(tokens))

    async def prefetch(self, namespace: Namespace, tokens: Sequence[int]) -> None:
        self.lifted.append(tuple(tokens))

    async def export(self, namespace: Namespace, tokens: Sequence[int]) -> bytes:
        return b"kv of %d" % len(tokens)

    async def restore(self, namespace: Namespace, tokens: Sequence[int], exported: bytes) -> int:
        self.restored.append((namespace, tuple(tokens), exported))
        return len(tokens)

    async def verify(self) -> Verification:
        if self.broken:
            raise InvariantBroken("a cell too many")
        return Verification(16, 0)

    def statistics(self) -> ServiceStatistics:
        return ServiceStatistics(MODEL, _POOL, _SCHEDULER, _STORE, 12.5, draining=self.drained)

    async def drain(self) -> bool:
        self.drained = True
        self.ready = False
        return True

    def close(self, *, at_once: bool = False) -> None:
        self.closed = True


def events_of(tokens: Sequence[int], *, reason: FinishReason = FinishReason.STOP) -> list[TokenEvent]:
    """Token events with a finish of their own at the end."""
    finish = Finish(reason, Usage(10, 4, len(tokens)))
    return [*(TokenEvent(token) for token in tokens), TokenEvent(None, finish=finish)]


_POOL = PoolStatistics(
    shape=PoolShape(4096, 8, annex_cells=512),
    used_cells=100,
    running_cells=60,
    idle_cells=40,
    shared_cells=30,
    saved_cells=50,
    peak_cells=120,
    fragmentation=0.25,
    hit_tokens={"running": 70, "idle": 5},
    missed_tokens=25,
    evicted_cells={"cells": 9},
    compactions=1,
    namespaces=(),
    sequences=(
        SequenceStatistics(SeqId(0), DEFAULT_NAMESPACE, SequenceState.DECODING, 60, 30, 0.0, RequestId("r-0")),
        SequenceStatistics(SeqId(1), DEFAULT_NAMESPACE, SequenceState.IDLE, 40, 30, 2.5, None),
    ),
)

_RAM = TierStatistics(
    name="ram",
    blocks=3,
    bytes=3000,
    budget_bytes=10_000,
    pinned_bytes=1000,
    in_flight_bytes=500,
    bytes_by_form={Form.RAW: 2000, Form.Q8_0: 1000},
    hit_tokens=128,
    missed_tokens=64,
    written_bytes=4000,
    read_bytes=2000,
    evicted_blocks=1,
    damaged_blocks=0,
    errors=0,
    latency_seconds=1e-6,
    bytes_per_second=5e9,
)
_DISK = dataclasses.replace(_RAM, name="disk", blocks=7, damaged_blocks=2, errors=1, latency_seconds=2e-4)
_PREFETCH = PrefetchStatistics(hints=3, guesses=5, issued_blocks=9, issued_bytes=900, used_bytes=600, wasted_bytes=100)
_STORE = StoreStatistics((_RAM, _DISK), 300.0, 2e9, 3e9, {"fetch": 4}, _PREFETCH, policy_seconds=0.25)
_SCHEDULER = SchedulerStatistics(
    waiting=1,
    prefilling=2,
    decoding=3,
    swapped=0,
    users=4,
    submitted_total=10,
    finished_total={"stop": 4},
    rejected_total=0,
    swaps_total=0,
    prompt_tokens_total=100,
    cached_tokens_total=70,
    computed_tokens_total=30,
    generated_tokens_total=44,
    steps_total=50,
    step_seconds_total=2.0,
    decode_seconds_total=1.9,
    sample_seconds_total=0.05,
    prefill_budget_tokens=192,
    prefill_tokens_per_second=330.0,
    layout_moves_total=0,
    ahead_tokens_total=0,
    interrupted_steps_total=0,
    shifts_total=0,
    invariant_failures_total=0,
)
