"""The Python interface: the engine, the shared cache and the scheduler in this process, without HTTP.

`open` loads a model and returns a `Herd`; everybody who asks it shares one KV cache, exactly as the clients of `pasture
serve` do. Any number of conversations may run at once, as tasks of one event loop. Leaving the `with` block (or `async with`,
which lets running replies finish first) frees the model.

Settings are the arguments alone: neither the environment nor `pasture.toml` is read, so a program behaves the same everywhere.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from os import PathLike, fspath
from types import TracebackType
from typing import Literal, Self, TypedDict, Unpack

from pasture.config import validate_settings
from pasture.core.errors import EngineError
from pasture.core.ports import Service
from pasture.core.statistics import ServiceStatistics
from pasture.core.values import (
    DEFAULT_NAMESPACE,
    Constraint,
    FinishReason,
    ModelInfo,
    Namespace,
    Request,
    RequestId,
    SamplingParams,
    Usage,
)
from pasture.text.prompts import Prompts
from pasture.text.replies import Fragment, read_reply
from pasture.text.stops import StopStrings

Messages = Sequence[Mapping[str, object]]
"""As in OpenAI's API: `[{"role": "user", "content": "Hello"}]`."""


class OpenOptions(TypedDict, total=False):
    """What `open` takes beside the model: settings of the same names as the command line's, without the server's."""

    kv_cells: int
    kv_memory: str | int
    kv_annex: int
    share_prefix: bool
    kv_layout: Literal["auto", "unified", "streams"]
    cache_type_k: str
    cache_type_v: str
    kv_ram: str | int
    kv_cache: str
    kv_disk: str | int
    kv_key_file: str
    kv_remote: str
    kv_compress: Literal["auto", "off", "lossless", "q8_0", "q4_0"]
    kv_quality: float
    kv_policy: Literal["foresight", "lru", "s3fifo"]
    kv_expire: str | float
    prefetch: bool
    idle_live: str | float
    max_running: int
    max_queue: int
    itl_target: str | float
    timeout: str | float
    drain_timeout: str | float
    threads: int
    threads_batch: int
    batch_size: int
    ubatch_size: int
    flash_attn: Literal["on", "off", "auto"]
    n_gpu_layers: int
    main_gpu: int
    tensor_split: Sequence[float]
    weights: Literal["auto", "file", "f16", "bf16"]
    mmap: bool
    mlock: bool
    self_check: bool
    alias: str
    chat_template: str
    chat_template_file: str


class GenerateOptions(TypedDict, total=False):
    """How one reply is made; everything is optional."""

    max_tokens: int
    """at most; unless given, what the cache leaves for one conversation"""
    stop: str | Sequence[str]
    """text, or texts, that end the reply and are not part of it"""
    ignore_eos: bool
    """go on to max_tokens, whatever the model says"""
    sampling: SamplingParams
    """every sampling parameter; the ones below replace single fields of it"""
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    constraint: Constraint
    """what the reply must be"""
    user: str
    """who asks: turns are shared out fairly between users"""
    namespace: str
    """who may share: only requests of one namespace reuse each other's tokens"""
    deadline_seconds: float
    tools: Sequence[Mapping[str, object]]
    """handed to the chat template"""


_SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "seed", "constraint")


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete answer."""

    text: str
    reason: FinishReason
    usage: Usage
    """its `cached_tokens` are the prompt tokens that nobody had to compute again"""


class Herd:
    """A loaded model and everybody who talks to it. Made by `open`.

    The methods that generate belong to one event loop at a time; `statistics` may be called from anywhere.
    """

    def __init__(self, service: Service, chat_template: str | None = None) -> None:
        self._service = service
        self._prompts = Prompts(service.vocabulary, chat_template)

    @property
    def model(self) -> ModelInfo:
        return self._service.model

    async def chat(self, messages: Messages, **options: Unpack[GenerateOptions]) -> AsyncGenerator[str]:
        """The reply to a conversation, piece by piece, as it is generated.

        Closing the generator early (`break` inside `contextlib.aclosing`, or cancelling the task) frees what the reply holds
        within one step. Raises RequestError for a conversation that cannot be served, EngineError when the engine fails.
        """
        prompt = self._prompts.chat(messages, tools=options.get("tools"))
        async with aclosing(self._fragments(prompt, options)) as fragments:
            async for fragment in fragments:
                if fragment.text:
                    yield fragment.text

    async def complete(self, prompt: str, **options: Unpack[GenerateOptions]) -> AsyncGenerator[str]:
        """The continuation of a text, piece by piece; no chat template. Otherwise as `chat`."""
        async with aclosing(self._fragments(self._prompts.text(prompt), options)) as fragments:
            async for fragment in fragments:
                if fragment.text:
                    yield fragment.text

    async def chat_text(self, messages: Messages, **options: Unpack[GenerateOptions]) -> Reply:
        """The whole reply to a conversation, with what it cost. Raises as `chat` does."""
        return await self._reply(self._prompts.chat(messages, tools=options.get("tools")), options)

    async def complete_text(self, prompt: str, **options: Unpack[GenerateOptions]) -> Reply:
        """The whole continuation of a text, with what it cost. Raises as `chat` does."""
        return await self._reply(self._prompts.text(prompt), options)

    def ask(self, question: str, **options: Unpack[GenerateOptions]) -> str:
        """The answer to one question, for scripts without an event loop; blocks until it is complete."""
        return asyncio.run(self.chat_text([{"role": "user", "content": question}], **options)).text

    def statistics(self) -> ServiceStatistics:
        """The pool and the scheduler right now, as a frozen value."""
        return self._service.statistics()

    def close(self) -> None:
        """End at once and free the model; replies that still run are cancelled."""
        self._service.close()

    async def _reply(self, prompt: tuple[int, ...], options: GenerateOptions) -> Reply:
        texts: list[str] = []
        async with aclosing(self._fragments(prompt, options)) as fragments:
            async for fragment in fragments:
                texts.append(fragment.text)
                if fragment.finish is not None:
                    return Reply("".join(texts), fragment.finish.reason, fragment.finish.usage)
        raise EngineError("the reply ended without saying why")

    def _fragments(self, prompt: tuple[int, ...], options: GenerateOptions) -> AsyncGenerator[Fragment]:
        vocabulary = self._service.vocabulary
        request = self._request(prompt, options)
        return read_reply(self._service.generate(request), vocabulary, StopStrings.of(options.get("stop", ())), len(prompt))

    def _request(self, prompt: tuple[int, ...], options: GenerateOptions) -> Request:
        changes = {name: options[name] for name in _SAMPLING_FIELDS if name in options}  # type: ignore[literal-required]
        room = max(1, self._service.max_conversation_tokens - len(prompt))
        return Request(
            request_id=RequestId(uuid.uuid4().hex),
            prompt=prompt,
            max_tokens=options.get("max_tokens", room),
            sampling=replace(options.get("sampling", SamplingParams()), **changes),
            namespace=Namespace(options.get("namespace", DEFAULT_NAMESPACE)),
            user=options.get("user", "anonymous"),
            stop_tokens=frozenset() if options.get("ignore_eos") else self._service.vocabulary.end_tokens,
            deadline_seconds=options.get("deadline_seconds"),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self._service.drain()
        self.close()


def open(model: str | PathLike[str], **options: Unpack[OpenOptions]) -> Herd:
    """Load a GGUF model into this process.

        with pasture.open("model.gguf", kv_memory="2GiB") as herd:
            print(herd.ask("What grazes on a common?"))

    Blocks while the model loads (and, the first time for a model, while a child process tries its settings out).
    Raises ConfigError for a setting that cannot be used, ModelError or DoesNotFit for a model that cannot.
    """
    from pasture.server import chat_template_of, start_service  # loads libllama: not before it is needed

    settings = validate_settings({"model": fspath(model), **options})
    service = start_service(settings)
    service.keep_for({})
    return Herd(service, chat_template_of(settings))
