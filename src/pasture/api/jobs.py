"""A checked body -> a job: the engine requests that answer it, and what its answer must look like.

`n` choices are `n` requests with one prompt; the scheduler shares it between them. With a seed, choice i draws with seed + i,
so that the choices differ and the whole answer repeats. Long prompts are rendered and tokenised on a worker thread, because
nothing may hold up the loop that carries everybody's streams.
"""

from __future__ import annotations

import math
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import JsonValue

from pasture.api.callers import TIERS, Caller
from pasture.api.constraints import constraint_of
from pasture.api.offload import off_loop, size_of
from pasture.api.publics import Publics
from pasture.api.schemas import MAX_REQUESTS, ChatBody, CompletionBody, GenerationBody, Prompt, TemplateBody
from pasture.api.settings import ApiSettings
from pasture.api.tool_choices import forced_call
from pasture.core.errors import PromptTooLong, RequestError
from pasture.core.ports import Service, Vocabulary
from pasture.core.values import Constraint, Kind, Request, RequestId, SamplingParams
from pasture.text.prompts import Prompts
from pasture.text.stops import StopStrings
from pasture.text.tool_calls import Dialect

_HERE = "\ue000"
"""stands where a prompt is cut: a private character, which no template trims"""
_WHOLE_WORDS = re.compile(r".*(?:\S(?=\s)|[.!?]\Z)", re.DOTALL)
"""a tokeniser may read the word that is being typed differently once it is complete; after a full stop it may be sent so"""

_SEEDS = 2**32 - 1  # the largest 32-bit seed means "any" to the engine

_SAMPLING_FIELDS = tuple(
    name for name in SamplingParams.__dataclass_fields__ if name not in ("seed", "logit_bias", "constraint")
)


@dataclass(frozen=True, slots=True)
class Choice:
    """One reply of the answer."""

    index: int
    request: Request
    echo: str = ""
    """text that comes before the reply"""


@dataclass(frozen=True, slots=True)
class Job:
    """One call, ready to be submitted."""

    job_id: str
    created: int
    model: str
    choices: tuple[Choice, ...]
    n_per_prompt: int
    stops: StopStrings
    stream: bool
    include_usage: bool
    include_pasture: bool
    dialect: Dialect | None = None
    """how calls are written in its replies; None where nobody looks for any"""


class Jobs:
    """Builds jobs for one service."""

    def __init__(self, service: Service, prompts: Prompts, settings: ApiSettings, publics: Publics) -> None:
        self._service = service
        self._prompts = prompts
        self._settings = settings
        self._publics = publics
        self._model = settings.model_alias or service.model.name

    async def chat(
        self, body: ChatBody, caller: Caller, prefix: str = "chatcmpl-", format_param: str = "response_format"
    ) -> Job:
        """Raises RequestError for whatever cannot be done as asked. `format_param`: what the client calls `response_format`."""
        _check_chat(body)
        form, call = constraint_of(body, format_param), forced_call(body, self._prompts.dialect)
        if form is not None and call is not None:
            raise RequestError(f"a reply cannot be a call and bound by {form.param} at once", param="tool_choice")
        looks_for_calls = body.tools and body.tool_choice != "none" and form is None
        prompt = await self._rendered(body)
        limit = body.max_completion_tokens or body.max_tokens
        n_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        job = self._job(prefix, body, caller, [(prompt, "")], limit, n_logprobs, form or call)
        return replace(job, dialect=self._prompts.dialect) if looks_for_calls else job

    async def completion(self, body: CompletionBody, caller: Caller) -> Job:
        """Raises RequestError for whatever cannot be done as asked."""
        _check_completion(body)
        constraint = constraint_of(body)

        def read() -> list[tuple[tuple[int, ...], str]]:
            return [(self._tokens(prompt), self._echo(prompt) if body.echo else "") for prompt in body.prompt]

        prompts = await off_loop(sum(map(len, body.prompt)), read)
        return self._job("cmpl-", body, caller, prompts, body.max_tokens, body.logprobs, constraint)

    async def tokens(self, messages: Sequence[Mapping[str, JsonValue]], context: Mapping[str, object]) -> tuple[int, ...]:
        """What a conversation is to the model before anybody asks for a reply; none for no messages. Raises RequestError."""
        if not messages:
            return ()
        fields = {**context, "messages": messages, "add_generation_prompt": False}
        return await self._rendered(TemplateBody.model_validate(fields))

    async def upcoming(
        self, messages: Sequence[Mapping[str, JsonValue]], context: Mapping[str, object], draft: str = ""
    ) -> tuple[int, ...]:
        """The next prompt as far as it is known: a conversation as its next turn will show it, and what its user has typed.

        Ends with the last word or sentence of `draft` that is complete. Raises RequestError.
        """
        typed = _WHOLE_WORDS.match(draft.lstrip())
        question = {"role": "user", "content": (typed[0] if typed else "") + _HERE}
        fields = {**context, "messages": [*messages, question], "add_generation_prompt": False}
        return await self._rendered(TemplateBody.model_validate(fields), up_to=_HERE)

    def prefill(self, tokens: tuple[int, ...], caller: Caller) -> Request:
        """A request that only brings tokens into the cache."""
        longest = self._longest(caller)
        if len(tokens) > longest:
            raise PromptTooLong(f"the conversation has {len(tokens)} tokens; one here holds {longest}", param="session_id")
        return Request(
            RequestId("prefetch-" + secrets.token_hex(12)),
            tokens,
            0,
            namespace=caller.namespace,
            tenant=caller.tenant.name,
            user=caller.user,
            allowance=caller.allowance,
            priority=min(caller.priority, 0),
        )

    def render(self, body: TemplateBody) -> str:
        """The conversation as the model will read it."""
        return self._prompts.template.render(
            body.messages,
            tools=None if body.tool_choice == "none" else body.tools,
            add_generation_prompt=body.add_generation_prompt,
            variables=body.chat_template_kwargs,
        )

    async def _rendered(self, body: TemplateBody, up_to: str = "") -> tuple[int, ...]:
        """The conversation as tokens, before the last `up_to` in its text."""

        def read() -> tuple[int, ...]:
            text, found, _ = self.render(body).rpartition(up_to) if up_to else (self.render(body), "", "")
            if up_to and not found:
                raise RequestError("the chat template does not show what a user says", param="messages")
            return self._prompts.text(text, param="messages")

        return await off_loop(size_of(body.messages, body.tools), read)

    def _tokens(self, prompt: Prompt) -> tuple[int, ...]:
        return self._prompts.text(prompt) if isinstance(prompt, str) else self._prompts.tokens(prompt)

    def _echo(self, prompt: Prompt) -> str:
        return prompt if isinstance(prompt, str) else self._prompts.detokenize(prompt)

    def _job(
        self,
        prefix: str,
        body: GenerationBody,
        caller: Caller,
        prompts: Sequence[tuple[tuple[int, ...], str]],
        limit: int | None,
        n_logprobs: int | None,
        constraint: Constraint | None,
    ) -> Job:
        n = body.n or 1
        if body.stream_options is not None and not body.stream:
            raise RequestError("stream_options needs stream: true", param="stream_options")
        vocabulary = self._service.vocabulary
        sampling = replace(sampling_params(body, self._settings.sampling, vocabulary), constraint=constraint)
        job_id = prefix + secrets.token_hex(12)
        choices: list[Choice] = []
        for tokens, echo in prompts:
            template = Request(
                request_id=RequestId(job_id),
                prompt=tokens,
                max_tokens=self._room(tokens, limit, self._longest(caller)),
                sampling=sampling,
                namespace=caller.namespace,
                public_tokens=self._publics.common(tokens),
                tenant=caller.tenant.name,
                user=body.user or caller.user,
                allowance=caller.allowance,
                priority=caller.priority if body.service_tier is None else caller.allowed(TIERS[body.service_tier]),
                stop_tokens=frozenset() if body.ignore_eos else vocabulary.end_tokens,
                n_logprobs=n_logprobs,
                deadline_seconds=body.deadline_seconds or self._settings.deadline_seconds,
                expects=_expects(body, len(prompts)),
                traced=self._settings.tracing.on,
                session=_session(body, caller),
            )
            for i in range(n):
                index = len(choices)
                request = replace(template, request_id=RequestId(f"{job_id}-{index}"), sampling=_seeded(sampling, i))
                choices.append(Choice(index, request, echo))
        return Job(
            job_id=job_id,
            created=int(time.time()),
            model=self._model,
            choices=tuple(choices),
            n_per_prompt=n,
            stops=StopStrings.of(body.stop),
            stream=bool(body.stream),
            include_usage=body.stream_options is not None and body.stream_options.include_usage,
            include_pasture=bool(body.pasture),
        )

    def _longest(self, caller: Caller) -> int:
        """Tokens of the longest conversation that the caller may have here."""
        cells, longest = caller.allowance.live_cells, self._service.max_conversation_tokens
        return longest if cells is None else min(cells, longest)

    @staticmethod
    def _room(prompt: Sequence[int], limit: int | None, longest: int) -> int:
        """Tokens the reply may have: what was asked for, within what one conversation can hold."""
        room = longest - len(prompt)
        if room < 1:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens; a conversation here holds {longest}, its reply included", param="prompt"
            )
        return room if limit is None else min(limit, room)


def sampling_params(body: GenerationBody, defaults: SamplingParams, vocabulary: Vocabulary) -> SamplingParams:
    """The body's sampling fields over the defaults. Raises RequestError for a bias on a token that does not exist."""
    given: dict[str, float] = {}
    for name in _SAMPLING_FIELDS:
        value = getattr(body, name)
        if value is not None:
            given[name] = value
    bias = {**defaults.logit_bias, **body.logit_bias}
    for token in bias:
        if not 0 <= token < vocabulary.n_tokens:
            raise RequestError(f"logit_bias: token {token} is not in the vocabulary", param="logit_bias")
    if body.ignore_eos:
        bias |= dict.fromkeys(vocabulary.end_tokens, -math.inf)
    # llama-server's clients send -1 for "any seed"
    seed = defaults.seed if body.seed is None else None if body.seed == -1 else body.seed % _SEEDS
    return replace(defaults, **given, seed=seed, logit_bias=bias)  # type: ignore[arg-type]  # names and types checked by the schema


def _session(body: GenerationBody, caller: Caller) -> str | None:
    """What the client says that the request belongs to: an id, or any name that it uses again."""
    named = (body.session_id or body.prompt_cache_key) if isinstance(body, ChatBody) else None
    return named or caller.session


def _expects(body: GenerationBody, n_prompts: int) -> Kind:
    """What will probably follow the reply: with tools at hand, most replies of an agent call one."""
    if n_prompts > 1:
        return Kind.BATCH
    return Kind.TOOL if isinstance(body, ChatBody) and body.tools and body.tool_choice != "none" else Kind.CHAT


def _seeded(sampling: SamplingParams, choice: int) -> SamplingParams:
    if sampling.seed is None or choice == 0:
        return sampling
    return replace(sampling, seed=(sampling.seed + choice) % _SEEDS)


def _check_chat(body: ChatBody) -> None:
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    if any(modality != "text" for modality in body.modalities or ()):
        raise RequestError("this model writes text only", param="modalities")


def _check_completion(body: CompletionBody) -> None:
    n_replies = (body.n or 1) * len(body.prompt)
    if n_replies > MAX_REQUESTS:
        raise RequestError(f"{n_replies} replies in one call are too many (at most {MAX_REQUESTS})", param="n")
    if body.best_of is not None and body.best_of > (body.n or 1):
        raise RequestError("best_of greater than n is not supported", param="best_of")
    if body.echo and body.logprobs is not None:
        raise RequestError("log probabilities of an echoed prompt are not supported", param="echo")
