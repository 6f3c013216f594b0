"""Whose request it is: the tenant that its key belongs to, and how its prompts are filed, queued and counted.

The tenant is put into the request's scope by the middleware that checked the key; nothing in a body or in another header can
change it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fastapi import Request
from starlette.types import Scope

from pasture.core.errors import RequestError
from pasture.core.values import Allowance, Namespace
from pasture.sessions.state import State
from pasture.sessions.values import Tenant

TENANT, KEY = "pasture.tenant", "pasture.key"
"""where in a scope the middleware notes the tenant, and a digest of the key"""
ADMIN = "pasture.admin"
"""and that it was the admin key"""

PRIORITIES = {"low": -1, "normal": 0, "high": 1}
"""of the header X-Priority"""
TIERS = {"flex": -1, "auto": 0, "default": 0, "scale": 0, "priority": 1}
"""of the field service_tier, OpenAI's words for the same"""


@dataclass(frozen=True, slots=True)
class Caller:
    """What a request's key and headers say of it."""

    tenant: Tenant
    namespace: Namespace
    user: str
    """whose turn it takes unless the body names somebody: a digest of the key, else the client's address"""
    priority: int = 0
    """already within what the tenant is allowed"""
    allowance: Allowance = field(default_factory=Allowance)
    """of its namespace"""
    session: str | None = None
    """what its header says that the request belongs to"""

    def allowed(self, priority: int) -> int:
        """The priority, or the highest that the tenant may have."""
        return min(priority, self.tenant.limits.max_priority)


def caller_of(request: Request, state: State) -> Caller:
    """Raises RequestError for a priority that is none."""
    tenant = tenant_of(request.scope, state)
    wanted = request.headers.get("x-priority", "normal").lower()
    if wanted not in PRIORITIES:
        raise RequestError(f"x-priority is one of {', '.join(PRIORITIES)}", param="x-priority")
    priority = min(PRIORITIES[wanted], tenant.limits.max_priority)
    namespace, allowance = tenant.namespace(state.share), tenant.allowance(state.share)
    return Caller(tenant, namespace, _user(request), priority, allowance, request.headers.get("x-session-id"))


def tenant_of(scope: Scope, state: State) -> Tenant:
    """The tenant that the middleware found."""
    tenant = scope.get(TENANT)
    return tenant if isinstance(tenant, Tenant) else state.open_tenant


def _user(request: Request) -> str:
    key = request.scope.get(KEY)
    if isinstance(key, str):
        return f"key:{key}"
    return "anonymous" if request.client is None else request.client.host
