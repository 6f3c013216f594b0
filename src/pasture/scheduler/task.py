"""A task: what the scheduler knows of one request between submission and its last event. Engine thread only."""

from __future__ import annotations

from collections.abc import Callable

from pasture.core.storage import Lift, Pin
from pasture.core.values import Request, Sampler, Usage
from pasture.kv.radix import token_array
from pasture.kv.sequence import Sequence
from pasture.scheduler.timeline import Timeline

Paused = Callable[[], bool]


class Task:
    """Where the request is follows from its fields:

    waiting    no sequence, no pin             prefilling  sequence, more than one token to compute or none drawn yet
    swapped    `pin`                           decoding    sequence, one drawn token to compute
    """

    __slots__ = (
        "_compiled",
        "_paused",
        "cached_tokens",
        "first_token_at",
        "leader",
        "leader_length",
        "lift",
        "looked",
        "n_failures",
        "n_generated",
        "n_saves",
        "n_swaps",
        "pin",
        "request",
        "sampler",
        "save_at",
        "seen_save",
        "sequence",
        "started_at",
        "stored_tokens",
        "submitted_at",
        "timeline",
        "tokens",
        "waits_for",
    )

    def __init__(self, request: Request, submitted_at: float, paused: Paused, compiled: object | None = None) -> None:
        """`compiled`: what the engine made of its constraint (`Engine.prepare`), held for as long as the task lives."""
        self.request = request
        self.submitted_at = submitted_at
        self.tokens = token_array(request.prompt)
        """the prompt and every token drawn so far; `sequence.length` of them are computed"""
        self.sequence: Sequence | None = None
        self.sampler: Sampler | None = None
        self.pin: Pin | None = None
        """holds what was swapped out"""
        self.n_saves = 0
        """of its KV that are still under way"""
        self.lift: Lift | None = None
        """what slow tiers are being asked for, or have brought"""
        self.looked = False
        """whether the store was asked"""
        self.stored_tokens = 0
        """what the store had in RAM when it was asked"""
        self.seen_save = 0
        """the newest save when the store was asked"""
        self.waits_for: int | None = None
        """the one save whose end was waited for"""
        self.save_at: int | None = None
        """length at which its state is to be kept for others (models whose states cannot be cut)"""
        self.started_at: float | None = None
        self.first_token_at: float | None = None
        self.cached_tokens = 0
        self.n_generated = 0
        self.n_swaps = 0
        self.n_failures = 0
        self.timeline = Timeline(submitted_at) if request.traced else None
        self.leader: Task | None = None
        """whose prefill this one waits for, until that one's sequence is `leader_length` long"""
        self.leader_length = 0
        self._paused = paused
        self._compiled = compiled

    @property
    def computed(self) -> int:
        return self.sequence.length if self.sequence is not None else 0

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be drawn; at least 1 while the request runs."""
        return len(self.tokens) - self.computed

    @property
    def decoding(self) -> bool:
        return self.n_generated > 0 and self.remaining == 1

    @property
    def swapped(self) -> bool:
        return self.pin is not None

    @property
    def paused(self) -> bool:
        """Its reader is too far behind."""
        return self._paused()

    @property
    def tokens_to_draw(self) -> int:
        return self.request.max_tokens - self.n_generated

    def usage(self, now: float) -> Usage:
        started = self.started_at if self.started_at is not None else now
        first = self.first_token_at if self.first_token_at is not None else now
        return Usage(
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self.cached_tokens,
            completion_tokens=self.n_generated,
            queue_seconds=started - self.submitted_at,
            first_token_seconds=first - self.submitted_at,
            total_seconds=now - self.submitted_at,
            n_swaps=self.n_swaps,
            phases=self.timeline.phases(now) if self.timeline is not None else (),
        )

    def release_sampler(self) -> None:
        if self.sampler is not None:
            self.sampler.close()
            self.sampler = None
