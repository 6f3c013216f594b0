"""What the room deals in: tenants with their limits, sessions, responses. Frozen, without behaviour beyond small derivations.

A *tenant* is who may share with whom: its salt makes the namespace of its requests, and everything stored is filed under its
name. A *turn* is one step of a conversation (what was asked and what was answered); turns hang in a tree, so that any number
of sessions and responses have their common past once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b

from pasture.core.values import DEFAULT_NAMESPACE, Allowance, Namespace

Message = Mapping[str, object]
"""as in OpenAI's API, JSON through and through"""

DEFAULT_TENANT = "default"

DAY_SECONDS = 86_400.0


class Share(StrEnum):
    """Between whom prompts are shared."""

    TENANT = "tenant"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one tenant may have. None: no limit of its own."""

    weight: float = 1.0
    """of its turn and of what is guaranteed, among the tenants, against a usual 1"""
    max_priority: int = 0
    """the highest that its requests may have: -1 low, 0 normal, 1 high, which makes others wait"""
    max_concurrent: int | None = None
    """replies at the scheduler at once"""
    max_queued: int = 256
    """requests that wait for places there"""
    tokens_per_minute: int | None = None
    """prompt and reply tokens together"""
    max_live_cells: int | None = None
    """tokens of its conversations in the live cache at once; the longest conversation it can have"""
    max_ram_bytes: int | None = None
    """of its conversations that rest in RAM"""
    max_disk_bytes: int | None = None
    """the same on disk"""
    guaranteed_share: float | None = None
    """0..1 of the live cache, RAM and disk that no other tenant can push it below; None: by weight"""
    max_sessions: int = 10_000
    """kept ones; of those that were only named the longest unused goes when there is another"""
    max_responses: int = 10_000
    """stored ones; the least recently used goes when another is stored"""
    max_pinned: int = 16
    """sessions; what is pinned takes RAM that nothing else can have"""
    max_transcript_bytes: int = 256 << 20
    idle_seconds: float = 7 * DAY_SECONDS
    """unused for so long, a session or a response that is not pinned is forgotten"""
    lifetime_seconds: float = 30 * DAY_SECONDS
    """the same from its beginning on, however often it is used"""

    @property
    def allowance(self) -> Allowance:
        """What of this concerns the cache."""
        return Allowance(self.weight, self.max_live_cells, self.max_ram_bytes, self.max_disk_bytes, self.guaranteed_share)


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whose request it is."""

    name: str
    salt: bytes = b""
    """random and secret; empty for the one tenant of a server without keys"""
    limits: Limits = Limits()

    def namespace(self, share: Share = Share.TENANT) -> Namespace:
        """Where its prompts are shared. Nobody who does not have the salt can name it."""
        if share is Share.ALL or not self.salt:
            return DEFAULT_NAMESPACE
        return Namespace("t-" + blake2b(self.salt, digest_size=20, person=b"pasture-space").hexdigest())

    def allowance(self, share: Share = Share.TENANT) -> Allowance:
        """What its namespace may hold; where everybody shares one, nobody's limits apply to it."""
        own = self.namespace(share) == self.namespace()
        return self.limits.allowance if own else Allowance(self.limits.weight)


@dataclass(frozen=True, slots=True)
class Key:
    """An API key as it is kept: without the key."""

    key_id: str
    tenant: str
    label: str
    created: float
    """Unix time, as all times in this room"""
    revoked: float | None = None


@dataclass(frozen=True, slots=True)
class Counters:
    """What a session's requests have cost, all together."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """of prompt_tokens, those whose KV was there"""
    reply_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Session:
    """A conversation that the server keeps."""

    session_id: str
    tenant: str
    name: str | None
    """what the client calls it (`prompt_cache_key`), unique in its tenant"""
    head: str | None
    """its last turn; None: nothing said yet"""
    n_messages: int
    n_tokens: int
    """of the whole conversation, when it was used last"""
    created: float
    last_used: float
    pinned: bool
    parent: str | None
    """the session that it was forked from"""
    parent_messages: int
    """how many messages it has from there"""
    metadata: Mapping[str, object] = field(default_factory=dict)
    """the client's own"""
    counters: Counters = Counters()


@dataclass(frozen=True, slots=True)
class OpenSession(Session):
    """One with all that its prompt is made from, which may be long: lists leave it out."""

    context: Mapping[str, object] = field(default_factory=dict)
    """besides what was said: tools, template variables"""


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """An answer of `/v1/responses` that can be gone on from."""

    response_id: str
    tenant: str
    head: str
    """the turn that it ends"""
    created: float
    body: Mapping[str, object]
    """as it was sent"""
