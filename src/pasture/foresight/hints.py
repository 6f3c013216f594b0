"""Typing hints for a trace that has none: what chat pages would have said, had their users typed for a while before each turn.

    request      ... reply ends            hint                    next request
    user                       reads       types for a while       sends

A request goes on from the latest one whose whole blocks it begins with and from which nobody has gone on since. Its hint names
those blocks and no others: what a server knows of a conversation by then. Only people type: what a tool call waits for gets no
hint. Every hint made here comes true, which those of real users do not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pasture.core.values import Kind
from pasture.foresight.traces import TraceRequest

TYPING_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Hint:
    """Somebody is about to go on with a conversation."""

    at: float
    """seconds since the trace began"""
    blocks: tuple[int, ...]
    """chained ids of what it holds so far, whole blocks only"""


def typing_hints(requests: Iterable[TraceRequest], typing_seconds: float = TYPING_SECONDS) -> list[Hint]:
    """One for each turn, so long before it, but not before the reply that it answers. Both are in order of time."""
    hints: list[Hint] = []
    waiting: dict[int, TraceRequest] = {}
    """last whole block -> the latest request that ended with it"""
    for request in requests:
        last = next((block for block in reversed(request.blocks) if block in waiting), None)
        if last is not None:
            before = waiting.pop(last)
            at = max(request.at - typing_seconds, before.at if before.finished_at is None else before.finished_at)
            if at < request.at and before.expects is Kind.CHAT:
                hints.append(Hint(at, before.blocks[:-1]))
        if len(request.blocks) > 1:
            waiting[request.blocks[-2]] = request
    return sorted(hints, key=lambda hint: hint.at)
