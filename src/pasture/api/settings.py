"""What the HTTP layer can be told, as one frozen value. The composition root fills it; nothing here reads flags or files."""

from __future__ import annotations

from dataclasses import dataclass, field

from pasture.api.peers import Peer
from pasture.api.tracing import NoTracing, Tracing
from pasture.core.values import SamplingParams

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ApiSettings:
    model_alias: str | None = None
    """the name clients see; None: the model's own"""
    api_keys: tuple[str, ...] = ()
    """each opens the server to a tenant of its own, beside the keys in the state; none at all: open to everybody"""
    admin_key: str | None = None
    """opens what looks at everybody's doing; None: any key opens `/metrics` and `/slots`, and nothing the admin routes"""
    cors_origins: tuple[str, ...] = ()
    """origins whose pages may call the server; none: no CORS headers at all"""
    max_body_bytes: int = 32 * MIB
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """what a request that does not say gets"""
    chat_template: str | None = None
    """jinja source that replaces the model's own template"""
    deadline_seconds: float | None = None
    """how long a request that does not say may take; None: no limit"""
    turn_ahead: bool = True
    """whether what a next turn will need is computed while nobody asks"""
    prefetch: bool = True
    """whether what a client says will be asked for soon is brought back and computed before it is"""
    admin_port: int | None = None
    """where what looks at everybody's doing is served, and nothing else but pages and health; None: beside everything else"""
    peers: tuple[Peer, ...] = ()
    """servers that sessions may be sent to"""
    log_level: str = "info"
    tracing: Tracing = field(default_factory=NoTracing)
    """where spans go; the caller's to close"""
