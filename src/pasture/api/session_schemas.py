"""Bodies of the session routes, and how a session is told to its owner."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from pasture.api.schemas import MAX_MESSAGES
from pasture.core.values import Whereabouts
from pasture.sessions.store import MAX_FORKS
from pasture.sessions.values import Session

Json = dict[str, object]

_MetadataKey = Annotated[str, Field(max_length=64)]
_MetadataValue = Annotated[str, Field(max_length=512)]
"""as much as OpenAI's API takes"""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class NewSession(_Body):
    messages: Annotated[list[dict[str, JsonValue]], Field(max_length=MAX_MESSAGES)] = []
    name: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    metadata: Annotated[dict[_MetadataKey, _MetadataValue], Field(max_length=16)] = {}
    tools: list[dict[str, JsonValue]] | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None

    @property
    def context(self) -> Json:
        found: Json = {"tools": self.tools, "chat_template_kwargs": self.chat_template_kwargs}
        return {name: value for name, value in found.items() if value}


class ForkBody(_Body):
    n: Annotated[int, Field(ge=1, le=MAX_FORKS)] = 1


class TruncateBody(_Body):
    messages: Annotated[int, Field(ge=0)] | None = None
    """keep so many messages"""
    tokens: Annotated[int, Field(ge=0)] | None = None
    """keep as many whole messages as fit into so many tokens"""


class TargetBody(_Body):
    target_key: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    """a key of the tenant that gets it: having one is what owning means"""
    peer: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """another server, by the name that the operator gave it, or by its URL; without `target_key`, by the operator's key"""
    replica: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """of this cluster: the session stays what it is, and its KV is carried there (`move` alone)"""


def describe(session: Session, now: float, *, idle_seconds: float, lifetime_seconds: float) -> Json:
    """A session as its owner sees it."""
    expires = None if session.pinned else min(session.last_used + idle_seconds, session.created + lifetime_seconds)
    counters = session.counters
    return {
        "id": session.session_id,
        "object": "session",
        "name": session.name,
        "created_at": int(session.created),
        "last_used_at": int(session.last_used),
        "idle_seconds": round(max(0.0, now - session.last_used), 3),
        "expires_at": None if expires is None else int(expires),
        "pinned": session.pinned,
        "n_messages": session.n_messages,
        "n_tokens": session.n_tokens,
        "lineage": {"parent": session.parent, "messages": session.parent_messages},
        "usage": {
            "requests": counters.requests,
            "prompt_tokens": counters.prompt_tokens,
            "cached_tokens": counters.cached_tokens,
            "reply_tokens": counters.reply_tokens,
        },
        "metadata": dict(session.metadata),
    }


def describe_cache(found: Whereabouts, n_tokens: int, cell_bytes: int) -> Json:
    """Where a session's KV is."""
    return {
        "tokens": n_tokens,
        "cells": found.live_tokens,
        "shared_cells": found.shared_tokens,
        "bytes": found.live_tokens * cell_bytes,
        "tiers": {"live": found.live_tokens, "ram": found.ram_tokens, **found.slow_tokens},
    }
