"""The asyncio side of the engine: requests in, events out.

Each request has a channel that the engine thread fills and one task reads. Events cross threads once a step and event loop,
not once a token. A channel is bounded by pausing its request: when `max_unread_tokens` events wait, the scheduler leaves the
request out of its steps until the reader has caught up.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from array import array
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from pasture.core.errors import PromptTooLong, QueueFull, RequestError, ShuttingDown
from pasture.core.ports import Engine, OnEnd, Vocabulary
from pasture.core.statistics import PrefixContent, ServiceStatistics, Verification
from pasture.core.storage import Pin, Store
from pasture.core.values import Allowance, Finish, FinishReason, ModelInfo, Namespace, Request, TokenEvent, Usage, Whereabouts
from pasture.kv.radix import token_array
from pasture.scheduler import keeping
from pasture.scheduler.loop import Answer, EngineLoop
from pasture.scheduler.scheduler import Delivery, Scheduler
from pasture.scheduler.settings import LayoutChoice, SchedulerSettings
from pasture.scheduler.task import Task


class _Channel:
    """Filled and read on the reader's event loop; the engine thread only looks at `full`."""

    __slots__ = ("_arrived", "_events", "_limit", "_on_end", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int) -> None:
        self.loop = loop
        self._events: deque[TokenEvent] = deque()
        self._limit = limit
        self._arrived: asyncio.Future[None] | None = None
        self._on_end: OnEnd | None = None
        """of a channel that nobody reads any more"""

    def full(self) -> bool:
        return len(self._events) >= self._limit

    def put(self, event: TokenEvent) -> None:
        if self._on_end is not None:
            if event.finish is not None:
                self._on_end(event.finish.usage)
            return
        self._events.append(event)
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    async def get(self) -> TokenEvent:
        while not self._events:
            self._arrived = self.loop.create_future()
            await self._arrived
            self._arrived = None
        return self._events.popleft()

    def leave(self, on_end: OnEnd) -> None:
        """From here on only the end counts, which may be waiting to be read."""
        self._on_end, unread = on_end, list(self._events)
        self._events.clear()
        for event in unread:
            self.put(event)


class LocalService:
    """One engine in this process. Starts its thread at once; `close` ends it and frees the engine."""

    def __init__(self, engine: Engine, store: Store, settings: SchedulerSettings | None = None) -> None:
        """Engine and store are the service's from here on."""
        self._settings = settings or SchedulerSettings()
        self._store = store
        self._model = engine.model
        self._vocabulary = engine.vocabulary
        self._codec = engine.codec
        self._prepare = engine.prepare
        self._compiler = ThreadPoolExecutor(1, "pasture-constraints")
        """a thread of its own, so that constraints wait for each other and nobody else does"""
        self._limit = engine.shape.n_cells if self._settings.layout is LayoutChoice.AUTO else engine.shape.cells_per_sequence
        self._channels: dict[Task, _Channel] = {}
        self._abandoned: dict[Task, _Channel] = {}
        """whose reader has gone, and somebody still wants to know what the request had cost"""
        self._draining = False
        self._empty: asyncio.Event | None = None
        """set when the last request has ended; made by who waits for that"""
        self._n_rejected = 0
        self._started_at = time.monotonic()
        self._loop = EngineLoop(engine, self._settings, store, self._publish)
        self._loop.start()

    @property
    def model(self) -> ModelInfo:
        return self._model

    @property
    def vocabulary(self) -> Vocabulary:
        return self._vocabulary

    @property
    def max_conversation_tokens(self) -> int:
        return self._limit

    @property
    def ready(self) -> bool:
        return self._loop.alive and not self._draining

    @property
    def alive(self) -> bool:
        return not self._loop.ended

    async def generate(self, request: Request, on_end: OnEnd | None = None) -> AsyncGenerator[TokenEvent, None]:
        """See `pasture.core.ports.Service.generate`."""
        self._admit(request)
        channel = _Channel(asyncio.get_running_loop(), self._settings.max_unread_tokens)
        compiled = await self._compile(request, on_end)
        task = Task(request, time.monotonic(), channel.full, compiled)
        self._channels[task] = channel
        ended = True
        try:
            self._loop.submit(task)
            ended = False
            while not ended:
                was_full = channel.full()
                event = await channel.get()
                if was_full:
                    self._loop.nudge()
                ended = event.finish is not None
                if event.finish is not None and _never_started(event.finish):
                    assert event.finish.error is not None
                    if on_end is not None:
                        on_end(event.finish.usage)
                    raise event.finish.error
                yield event
        finally:
            if not ended and on_end is not None:
                self._leave(task, channel, on_end)
            del self._channels[task]
            if not ended:
                self._loop.cancel(request.request_id)
            if self._empty is not None and not self._channels:
                self._empty.set()
                self._empty = None

    async def locate(self, namespace: Namespace, tokens: Sequence[int], *, deep: bool = False) -> Whereabouts:
        """See `pasture.core.ports.Service.locate`."""
        path = token_array(tokens)
        found = await self._ask(lambda scheduler: keeping.locate(scheduler, namespace, path))
        if deep and path:
            slow = await asyncio.to_thread(self._store.held_by_slow, namespace, path)
            found = dataclasses.replace(found, slow_tokens=slow)
        return found

    async def open_prefix(self, number: int, n_tokens: int) -> PrefixContent | None:
        """See `pasture.core.ports.Service.open_prefix`."""
        path = self._loop.snapshot[0].path_to(number)
        if not path:
            return None
        node = path[-1]
        found = await self.locate(node.namespace, [token for step in path for token in step.tokens], deep=True)
        slow = {tier: node.own(held) for tier, held in found.slow_tokens.items()}
        return PrefixContent(tuple(node.tokens[:n_tokens]), node.n_tokens, node.own(found.ram_tokens), slow)

    async def live(self) -> Sequence[tuple[Namespace, array[int]]]:
        """The tokens of every sequence in the live cache, as far as they are computed. Raises ShuttingDown."""
        return await self._ask(keeping.live)

    def allow(self, namespace: Namespace, allowance: Allowance) -> None:
        """See `pasture.core.ports.Service.allow`. Without effect on a server that ends."""
        self._tell(lambda scheduler: scheduler.allow(namespace, allowance))

    def keep_for(self, seconds: Mapping[Namespace, float]) -> None:
        """See `pasture.core.ports.Service.keep_for`. Without effect on a server that ends."""
        self._tell(lambda scheduler: scheduler.keep_for(seconds))

    async def pin(self, namespace: Namespace, tokens: Sequence[int]) -> Pin:
        """See `pasture.core.ports.Service.pin`."""
        path = token_array(tokens)
        await self._ask(lambda scheduler: keeping.save(scheduler, namespace, path))
        pin = await self._ask(lambda scheduler: scheduler.resting.store.pin(namespace, path), self._unpin)
        return keeping.SafePin(pin, self._tell)

    async def quiet(self) -> None:
        """See `pasture.core.ports.Service.quiet`."""
        while self._channels:
            if self._empty is None:
                self._empty = asyncio.Event()
            await self._empty.wait()

    def anticipate(self, namespace: Namespace, tokens: Sequence[int], *, typing: bool = False) -> None:
        """See `pasture.core.ports.Service.anticipate`. Without effect on a server that ends."""
        expected = token_array(tokens)
        self._tell(lambda scheduler: scheduler.ahead.anticipate(namespace, expected, typing=typing))

    async def prefetch(self, namespace: Namespace, tokens: Sequence[int]) -> None:
        """See `pasture.core.ports.Service.prefetch`."""
        path, loop = token_array(tokens), asyncio.get_running_loop()
        there = asyncio.Event()

        def ready() -> None:
            with contextlib.suppress(RuntimeError):  # a loop that is closed waits for nothing
                loop.call_soon_threadsafe(there.set)

        await self._ask(lambda scheduler: scheduler.resting.store.prefetch(namespace, path, ready))
        await there.wait()

    async def export(self, namespace: Namespace, tokens: Sequence[int]) -> bytes:
        """See `pasture.core.ports.Service.export`."""
        path = token_array(tokens)
        await self._ask(lambda scheduler: keeping.save(scheduler, namespace, path))
        slabs = await self._ask(lambda scheduler: keeping.take(scheduler, namespace, path))
        return await asyncio.to_thread(keeping.pack, slabs, self._codec) if slabs else b""

    async def restore(self, namespace: Namespace, tokens: Sequence[int], exported: bytes) -> int:
        """See `pasture.core.ports.Service.restore`."""
        path, codec = token_array(tokens), self._codec
        packed = await asyncio.to_thread(keeping.unpack, exported, len(path), codec.fingerprint)
        return await self._ask(lambda scheduler: keeping.put(scheduler, namespace, path, packed, codec))

    async def verify(self) -> Verification:
        """See `pasture.core.ports.Service.verify`."""
        await self._ask(keeping.verify)
        return await self._ask(lambda scheduler: scheduler.resting.samples.found)

    def statistics(self) -> ServiceStatistics:
        pool, scheduler = self._loop.snapshot
        store = self._store.statistics()
        scheduler = dataclasses.replace(scheduler, rejected_total=self._n_rejected)
        return ServiceStatistics(self._model, pool, scheduler, store, time.monotonic() - self._started_at, self._draining)

    async def drain(self) -> bool:
        """Take nothing new and wait for what runs, at most `drain_seconds`."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.quiet(), self._settings.drain_seconds)
        return not self._channels

    def close(self, *, at_once: bool = False) -> None:
        self._draining = True
        self._compiler.shutdown(wait=False, cancel_futures=True)
        self._loop.stop(at_once=at_once)

    def _leave(self, task: Task, channel: _Channel, on_end: OnEnd) -> None:
        def ended(usage: Usage) -> None:
            del self._abandoned[task]
            on_end(usage)

        self._abandoned[task] = channel
        channel.leave(ended)

    async def _compile(self, request: Request, on_end: OnEnd | None) -> object | None:
        """What keeps the request's constraint at hand, if it has one. Raises RequestError for one that cannot be compiled."""
        constraint = request.sampling.constraint
        if constraint is None:
            return None
        begun = Task(request, time.monotonic(), lambda: False)
        try:
            return await asyncio.wrap_future(self._compiler.submit(self._prepare, constraint))
        except (asyncio.CancelledError, RuntimeError):
            if not self._draining:
                if on_end is not None:
                    on_end(begun.usage(time.monotonic()))
                raise
            raise ShuttingDown("the server is shutting down") from None

    def _admit(self, request: Request) -> None:
        if self._draining:
            raise ShuttingDown("the server is shutting down; send the request to another one")
        if not request.prompt:
            raise RequestError("the prompt is empty: it needs at least one token", param="prompt")
        if request.max_tokens < 0:
            raise RequestError("max_tokens must not be negative", param="max_tokens")
        if request.sampling.constraint is not None and not request.stop_tokens:
            raise RequestError("a reply that is bound to a form ends with it: ignore_eos is not possible", param="ignore_eos")
        needed = len(request.prompt) + request.max_tokens
        cells = request.allowance.live_cells
        if cells is not None and needed > cells:
            raise PromptTooLong(
                f"{len(request.prompt)} prompt tokens and {request.max_tokens} for the reply are {needed}; "
                f"{request.tenant} may have {cells} in the cache at once. Shorten the prompt or lower max_tokens",
                param="messages",
            )
        if needed > self._limit:
            raise PromptTooLong(
                f"{len(request.prompt)} prompt tokens and {request.max_tokens} for the reply are {needed}; "
                f"one conversation can hold {self._limit}. Shorten the prompt or lower max_tokens",
                param="messages",
            )
        if len(request.prompt) == self._limit:
            raise PromptTooLong(
                f"{needed} prompt tokens; one conversation can hold {self._limit}, one of them the reply's. Shorten the prompt",
                param="messages",
            )
        if self._is_full_for(request.tenant):
            self._n_rejected += 1
            raise QueueFull("too many requests are waiting; try again later", retry_after_seconds=self._retry_after())

    def _is_full_for(self, tenant: str) -> bool:
        """Whether the line is full; beyond its end, tenants that have less than their part of it still find a place."""
        waiting = Counter(task.request.tenant for task in self._channels if task.started_at is None)
        most = self._settings.max_waiting
        return waiting.total() >= most and waiting[tenant] >= most / len(waiting.keys() | {tenant})

    async def _ask(
        self, question: Callable[[Scheduler], Answer], take_back: Callable[[Answer], object] | None = None
    ) -> Answer:
        """`take_back` gets an answer that comes although whoever asked was cancelled, on any thread."""
        future = self._loop.ask(question)

        def unwanted(answered: Future[Answer]) -> None:
            if take_back is not None and not answered.cancelled() and answered.exception() is None:
                take_back(answered.result())

        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(unwanted)
            if self._loop.alive:
                raise
            raise ShuttingDown("the server is shutting down") from None

    def _unpin(self, pin: Pin) -> None:
        keeping.SafePin(pin, self._tell).release()

    def _tell(self, question: Callable[[Scheduler], None]) -> None:
        with contextlib.suppress(ShuttingDown):  # then the store is closed as well
            self._loop.ask(question)

    def _retry_after(self) -> float:
        """How long the line needs for a tenth of itself, as the engine goes now: 1 to 60 s."""
        _, scheduler = self._loop.snapshot
        finished = sum(scheduler.finished_total.values())
        seconds_each = scheduler.step_seconds_total / finished if finished else 1.0
        return min(60.0, max(1.0, seconds_each * scheduler.waiting / 10))

    def _publish(self, events: list[Delivery]) -> None:
        """Engine thread: hand the step's events to the loops of their readers, one call each."""
        batches: dict[asyncio.AbstractEventLoop, list[tuple[_Channel, TokenEvent]]] = {}
        for task, event in events:
            channel = self._channels.get(task) or self._abandoned.get(task)
            if channel is not None:
                batches.setdefault(channel.loop, []).append((channel, event))
        for loop, batch in batches.items():
            with contextlib.suppress(RuntimeError):  # a loop that is closed has no readers
                loop.call_soon_threadsafe(_fill, batch)


def _fill(batch: list[tuple[_Channel, TokenEvent]]) -> None:
    for channel, event in batch:
        channel.put(event)


def _never_started(finish: Finish) -> bool:
    """Whether the request can be refused with a status instead of ending in the middle of a stream."""
    return finish.reason is FinishReason.ERROR and isinstance(finish.error, RequestError) and not finish.usage.completion_tokens
