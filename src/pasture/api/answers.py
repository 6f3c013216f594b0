"""What the routes answer, as schemas: for `/openapi.json`, clients that generate code from it, and the tests that compare.

Answers are rendered as plain values and bytes, never through these models, so that no token costs a validation; that both
agree is what the schema tests check, over real requests. An answer whose fields are all listed here is closed, so a field that
is added there and not here fails them. What shows the server's own state (`/props`, `/slots`) is open.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, RootModel

Text = dict[str, JsonValue]
NonNegative = Annotated[int, Field(ge=0)]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class ErrorBody(_Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(_Answer):
    """Every error has this shape, OpenAI's."""

    error: ErrorBody


class PromptDetails(_Answer):
    cached_tokens: NonNegative


class UsageBody(_Answer):
    prompt_tokens: NonNegative
    completion_tokens: NonNegative
    total_tokens: NonNegative
    prompt_tokens_details: PromptDetails


class Timings(_Answer):
    """With `pasture: true`: where each choice's time and prompt came from."""

    choices: list[_Open]


class CalledFunction(_Answer):
    name: str
    arguments: str


class CalledTool(_Answer):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(_Answer):
    role: Literal["assistant"]
    content: str | None
    tool_calls: Annotated[list[CalledTool], Field(min_length=1)] | None = None
    refusal: None


class ChatChoice(_Answer):
    index: NonNegative
    message: AssistantMessage
    logprobs: Text | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class _Generated(_Answer):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: UsageBody
    pasture: Timings | None = None


class ChatCompletion(_Generated):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextChoice(_Answer):
    index: NonNegative
    text: str
    logprobs: Text | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(_Generated):
    object: Literal["text_completion"]
    choices: list[TextChoice]


class OutputText(_Answer):
    type: Literal["output_text"]
    text: str
    annotations: list[Text]
    logprobs: list[Text]


class OutputMessage(_Answer):
    id: str
    type: Literal["message"]
    status: Literal["completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputText]


class OutputCall(_Answer):
    id: str
    type: Literal["function_call"]
    status: Literal["completed"]
    call_id: str
    name: str
    arguments: str


class StoredResponseBody(_Open):
    """A response as OpenAI's API has it; fields of requests come back as they were sent."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[OutputMessage | OutputCall]
    previous_response_id: str | None
    store: bool
    usage: Text | None


class Deleted(_Answer):
    id: str
    object: Literal["session", "response"]
    deleted: Literal[True]


class Lineage(_Answer):
    parent: str | None
    messages: NonNegative


class SessionUsage(_Answer):
    requests: NonNegative
    prompt_tokens: NonNegative
    cached_tokens: NonNegative
    reply_tokens: NonNegative


class SessionCache(_Answer):
    """Where a session's KV is, in tokens from its beginning."""

    tokens: NonNegative
    cells: NonNegative
    shared_cells: NonNegative
    bytes: NonNegative
    tiers: dict[str, NonNegative]


class SessionBody(_Answer):
    id: str
    object: Literal["session"]
    name: str | None
    created_at: int
    last_used_at: int
    idle_seconds: float
    expires_at: int | None
    pinned: bool
    n_messages: NonNegative
    n_tokens: NonNegative
    lineage: Lineage
    usage: SessionUsage
    metadata: Text


class SessionView(SessionBody):
    """One session with where its KV is; `cache` is missing where this model's template refuses what was said to another."""

    cache: SessionCache | None = None
    messages: list[Text] | None = None


class ImportedSession(SessionBody):
    restored_tokens: NonNegative


class SentSession(_Answer):
    """A session on another server."""

    id: str
    object: Literal["session.sent"]
    peer: str
    restored_tokens: NonNegative


class CarriedSession(_Answer):
    """A session whose KV is on another replica of the cluster now."""

    id: str
    object: Literal["session.carried"]
    replica: str
    tokens: NonNegative
    carried_tokens: NonNegative


class CopiedSession(RootModel[SessionBody | SentSession | CarriedSession]):
    """The session as it is now, here or on a peer, or where its KV is."""


class SessionPage(_Answer):
    object: Literal["list"]
    data: list[SessionBody]
    has_more: bool


class SeenSession(_Answer):
    """Somebody's session as the operator sees it; `tiers` is null where nobody can say where its KV is."""

    id: str
    tenant: str
    name: str | None
    pinned: bool
    idle_seconds: float
    n_messages: NonNegative
    n_tokens: NonNegative
    usage: SessionUsage
    tiers: dict[str, NonNegative] | None


class SessionOverview(_Answer):
    object: Literal["list"]
    data: list[SeenSession]
    total: NonNegative


class SessionList(_Answer):
    object: Literal["list"]
    data: list[SessionBody]


class Hinted(_Answer):
    object: Literal["chat.prefetch"]
    tokens: NonNegative
    cached_tokens: NonNegative


class Prefetched(_Answer):
    id: str
    object: Literal["session.prefetch"]
    tokens: NonNegative
    cached_tokens: NonNegative


class Check(_Answer):
    name: str
    status: Literal["ok", "warning", "unknown"]
    message: str
    facts: Text


class Diagnosis(_Answer):
    object: Literal["diagnosis"]
    ok: bool
    checks: list[Check]


class TenantBody(_Answer):
    name: str
    limits: Text


class TenantList(_Answer):
    object: Literal["list"]
    data: list[TenantBody]


class PublicPrefixBody(_Answer):
    name: str
    bytes: NonNegative


class PublicPrefixList(_Answer):
    object: Literal["list"]
    data: list[PublicPrefixBody]


class PublicPrefixGone(_Answer):
    name: str
    deleted: Literal[True]


class ModelBody(_Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    meta: Text


class ModelList(_Answer):
    object: Literal["list"]
    data: list[ModelBody]


class Props(_Open):
    """What the server is, as it is started."""

    model_alias: str
    total_slots: NonNegative
    kv: Text
    store: Text | None = None
    """where there is an admin key, shown to that key alone"""
    chat_template: str


class Slot(_Open):
    id: NonNegative
    state: str
    n_tokens: NonNegative


class SlotList(RootModel[list[Slot]]):
    """Every sequence in the live cache."""


class PieceOfToken(_Answer):
    id: int
    piece: str | list[int]


class Tokens(_Answer):
    tokens: list[int] | list[PieceOfToken]


class Content(_Answer):
    content: str


class RenderedPrompt(_Answer):
    prompt: str


class Health(_Answer):
    status: Literal["ok"]
