"""What the scheduler and the text layer expect of an engine. `pasture.engine` implements these twice: llama.cpp and a fake."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from pasture.core.statistics import PrefixContent, ServiceStatistics, Verification
from pasture.core.storage import Pin, SlabCodec
from pasture.core.values import (
    Allowance,
    Constraint,
    Form,
    Layout,
    ModelInfo,
    Namespace,
    PoolShape,
    Request,
    Sampler,
    SamplingParams,
    Segment,
    StepPlan,
    StepResult,
    TokenEvent,
    Usage,
    Whereabouts,
)

Clock = Callable[[], float]
"""Seconds, monotonic."""
OnEnd = Callable[[Usage], None]
"""Hears what a request has cost."""


class Vocabulary(Protocol):
    """Text <-> tokens. Immutable after load, so any thread may call it."""

    @property
    def n_tokens(self) -> int: ...
    @property
    def end_tokens(self) -> frozenset[int]:
        """End-of-generation ids (`<|im_end|>`, `</s>`, ...)."""
        ...

    @property
    def bos(self) -> int | None: ...
    @property
    def eos(self) -> int | None: ...
    @property
    def add_bos(self) -> bool:
        """Whether the model wants its BOS token put before a plain prompt."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The model's own jinja template; None where the file has none."""
        ...

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]: ...
    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The token's bytes, possibly part of a character. Control tokens are empty unless `special`."""
        ...


class Engine(Protocol):
    """A model and its live cache. One thread calls it."""

    @property
    def model(self) -> ModelInfo: ...
    @property
    def vocabulary(self) -> Vocabulary: ...
    @property
    def shape(self) -> PoolShape: ...

    def sampler(self, params: SamplingParams, prompt: Sequence[int], n_drawn: int = 0) -> Sampler:
        """A fresh sampler; `prompt` fills its penalty window. Raises RequestError for parameters that allow none.

        `n_drawn`: so many tokens of the reply were drawn elsewhere, with equal `params`; with a seed it draws what that
        sampler would have drawn next (mirostat begins anew).
        """
        ...

    def prepare(self, constraint: Constraint) -> object:
        """Compile the constraint, which may take a second, so that `sampler` has it at hand while the result is held.

        Any thread but one that others wait for. Raises RequestError for what cannot be compiled, or only with too much work.
        """
        ...

    def execute(self, plan: StepPlan) -> StepResult:
        """Operations in order, then one batch. Raises EngineError when an operation is impossible (a bug of the planner)."""
        ...

    def interrupt(self, wanted: bool) -> None:
        """While `wanted`, `execute` does not go on with works, as soon as the backend can stop: INTERRUPTED. Any thread."""
        ...

    @property
    def codec(self) -> SlabCodec:
        """Slabs as bytes, for the stores."""
        ...

    def rebuild(self, segments: Sequence[Segment], layout: Layout, n_seqs: int, form: Form | None = None) -> PoolShape:
        """Save every segment, lay the cache out anew, restore: compaction, a move to another layout, a shift to another form.

        `form`: RAW, or Q8_0 with as many more cells as go into the same bytes (about 1.88 times those of f16), the annex's
        with them, which is of no use then and comes back with RAW; None keeps what there is. Slabs and payloads of one form
        can be restored in every other.

        `segments` cover every used cell once, parents before children. Sequence ids are kept, so they must be below
        `n_seqs`. In the streams layout each holder gets a copy of its own. Returns the new shape. Raises DoesNotFit, with
        the cache as it was, when a sequence does not fit in the new layout, or the model does not have the form. Raises
        EngineError where the cache is not as it was; if a rebuild of nothing raises it too, the engine is of no use any more.
        """
        ...

    def close(self) -> None: ...


@runtime_checkable
class Movable(Protocol):
    """A service over several replicas, which can carry a conversation from one to another."""

    async def move(self, namespace: Namespace, tokens: Sequence[int], sessions: Sequence[str], replica: str) -> int:
        """Carry the KV of these tokens to a replica, where the sessions of these names are at home from then on.

        Returns how many of the tokens it has then. Raises NotFound for a replica that is not there, Conflict for one that
        takes nothing new, NoReplica where one is lost on the way.
        """
        ...


class Service(Protocol):
    """What the API and the Python interface stand on: `pasture.scheduler.service.LocalService` is the implementation."""

    @property
    def model(self) -> ModelInfo: ...
    @property
    def vocabulary(self) -> Vocabulary: ...
    @property
    def max_conversation_tokens(self) -> int:
        """Prompt and reply together; longer requests raise PromptTooLong."""
        ...

    @property
    def ready(self) -> bool: ...
    @property
    def alive(self) -> bool:
        """False when only a restart helps: what computes has ended."""
        ...

    def generate(self, request: Request, on_end: OnEnd | None = None) -> AsyncGenerator[TokenEvent, None]:
        """Queue the request and yield its events; the last one carries `finish`.

        Raises RequestError (QueueFull, PromptTooLong, ShuttingDown) from the first `__anext__`, before any event. Closing the
        generator, or cancelling the task in it, frees everything the request holds within one engine step.

        `on_end` hears, on the event loop and once, what a request had cost whose last event nobody gets: before the error is
        raised that it ended with in line, or some time after its reader left. What was never in line has cost nothing.
        """
        ...

    async def locate(self, namespace: Namespace, tokens: Sequence[int], *, deep: bool = False) -> Whereabouts:
        """Where the KV of these tokens is now. `deep`: slow tiers are asked as well. Raises ShuttingDown."""
        ...

    async def open_prefix(self, number: int, n_tokens: int) -> PrefixContent | None:
        """So many tokens of what a prefix of the statistics says, and where it rests; None where it has gone.

        What people wrote, so for an administrator alone. Raises ShuttingDown.
        """
        ...

    def allow(self, namespace: Namespace, allowance: Allowance) -> None:
        """What the namespace may hold: for what brings KV in without a request, which says so itself. Returns at once."""
        ...

    def keep_for(self, seconds: Mapping[Namespace, float]) -> None:
        """How long KV of these namespaces is kept unused; that of others as long as the service was told when it was made.

        All of them each time: who is not named any more is one of the others. Any thread; returns at once.
        """
        ...

    async def pin(self, namespace: Namespace, tokens: Sequence[int]) -> Pin:
        """Keep in RAM what there is of these tokens, live or in RAM. The pin may be released on any thread."""
        ...

    async def quiet(self) -> None:
        """Returns when no request is open that what is done beside them could slow down."""
        ...

    def anticipate(self, namespace: Namespace, tokens: Sequence[int], *, typing: bool = False) -> None:
        """Compute these tokens when nobody asks for anything: somebody's next prompt will probably begin with them.

        `typing`: it is being written, so what slow tiers have of it is fetched at once.
        """
        ...

    async def prefetch(self, namespace: Namespace, tokens: Sequence[int]) -> None:
        """Bring what slow tiers have of these tokens into RAM, and keep it there for a while; returns when it is there.

        What is asked for meanwhile goes first. Cancelling stops the waiting alone. Raises ShuttingDown.
        """
        ...

    async def export(self, namespace: Namespace, tokens: Sequence[int]) -> bytes:
        """The KV of these tokens, as far as it is at hand, for `restore` of a service with the same model; may be empty."""
        ...

    async def restore(self, namespace: Namespace, tokens: Sequence[int], exported: bytes) -> int:
        """Store what `export` gave for the same tokens; returns how many tokens it was.

        The bytes may come from anybody: raises Conflict for another model's, RequestError for bytes that are no export.
        """
        ...

    async def verify(self) -> Verification:
        """Check now that the books of the live cache agree with themselves, and some of what was restored with what was stored.

        Raises InvariantBroken where the books do not.
        """
        ...

    def statistics(self) -> ServiceStatistics: ...
    async def drain(self) -> bool:
        """Take nothing new, finish what runs; False when the time for that was over, and something still runs."""
        ...

    def close(self, *, at_once: bool = False) -> None:
        """End; requests that still run get a finish with reason `cancelled`.

        Blocks until all is kept that outlives the process; `at_once`: nothing more is. Any thread; safe to call twice, also
        while another call runs.
        """
        ...
