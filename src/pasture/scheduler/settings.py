"""What an operator can set about scheduling. Values, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from pasture.core.values import Form


class LayoutChoice(StrEnum):
    UNIFIED = "unified"
    STREAMS = "streams"
    AUTO = "auto"


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    share_prefix: bool = True
    layout: LayoutChoice = LayoutChoice.AUTO
    itl_target_seconds: float = 0.4
    """steps with someone's stream in them are kept to about this long by limiting prefill"""
    max_waiting: int = 1024
    """requests in line before QueueFull"""
    max_running: int = 254
    """requests with a sequence of their own at once"""
    age_bound_seconds: float = 120.0
    """who has waited this long goes first, however long the prompt"""
    default_deadline_seconds: float | None = None
    max_unread_tokens: int = 1024
    """a reader this far behind pauses its request"""
    idle_live_seconds: float | None = None
    """how long an idle conversation stays in the live cache before it rests in the store alone; None: until room is needed"""
    expire_seconds: float | None = None
    """how long what nobody uses stays in the live cache at all, be it that nobody needs the room; None: for ever"""
    shift_to: Form | None = None
    """what live cells are rewritten in when the pool stays short of them; None: never"""
    compact: bool = True
    rehearse: bool = False
    """measure steps and transfers before the first request"""
    check_invariants: bool = False
    """after every step (tests); otherwise when idle"""
    drain_seconds: float = 60.0
    """how long a drain waits for what runs"""
    policy: str = "lru"
