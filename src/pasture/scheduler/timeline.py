"""What a request spent its time with, for traces: noted by the scheduler as it goes, for requests that ask for it alone.

    queue ─► restore ─► prefill, prefill, ... ─► decode ─► swap ─► restore ─► decode ─► ...

Phases are in the order of their beginnings. A prefill is one chunk, a decode as many steps as follow each other without a swap.
What comes back from the store moves at the beginning of a step, before the tokens of that step are computed. Engine thread.
"""

from __future__ import annotations

from pasture.core.values import Phase, PhaseKind


class Timeline:
    def __init__(self, submitted_at: float) -> None:
        self._submitted_at = submitted_at
        self._phases: list[Phase] = []
        self._swapped_at: float | None = None
        self._restored_tokens = 0

    def started(self, now: float) -> None:
        """It has a sequence for the first time."""
        self._note(PhaseKind.QUEUE, self._submitted_at, now, 0)

    def restores(self, n_tokens: int) -> None:
        """So many tokens come back from the store at the beginning of the next step that it is in."""
        self._restored_tokens = n_tokens

    def left(self, now: float) -> None:
        """It was swapped out."""
        self._swapped_at = now

    def step(self, start: float, end: float, n_tokens: int, *, decodes: bool, restore_seconds: float) -> None:
        """It was in a step of `[start, end)`, which began with `restore_seconds` of moving KV."""
        if self._phases:  # it may have got its place within the step
            start = max(start, self._submitted_at + self._phases[-1].end_seconds)
        if self._swapped_at is not None:
            self._note(PhaseKind.SWAP, self._swapped_at, max(start, self._swapped_at), 0)
            self._swapped_at = None
        if self._restored_tokens:
            self._note(PhaseKind.RESTORE, start, start + restore_seconds, self._restored_tokens)
            start += restore_seconds
            self._restored_tokens = 0
        last = self._phases[-1] if self._phases else None
        if decodes and last is not None and last.kind is PhaseKind.DECODE:
            self._phases[-1] = Phase(PhaseKind.DECODE, last.start_seconds, end - self._submitted_at, last.n_tokens + n_tokens)
        else:
            self._note(PhaseKind.DECODE if decodes else PhaseKind.PREFILL, start, end, n_tokens)

    def phases(self, now: float) -> tuple[Phase, ...]:
        """So far; what it waits for is a phase that ends now."""
        waiting = []
        if not self._phases:
            waiting = [Phase(PhaseKind.QUEUE, 0.0, now - self._submitted_at, 0)]
        elif self._swapped_at is not None:
            waiting = [Phase(PhaseKind.SWAP, self._swapped_at - self._submitted_at, now - self._submitted_at, 0)]
        return (*self._phases, *waiting)

    def _note(self, kind: PhaseKind, start: float, end: float, n_tokens: int) -> None:
        self._phases.append(Phase(kind, start - self._submitted_at, end - self._submitted_at, n_tokens))
