"""When the live cache itself should be written smaller, so that more people fit: and when not any more.

    RAW  --- short of cells for a while --->  Q8_0 (about 1.9 times the cells in the same bytes, 2.3 with the annex's)
         <-- what runs and waits would fit again for a while, or the machine turned out to be slower that way ---

Smaller cells are not free everywhere: some backends compute on them more slowly than what swapping costs. So the tokens a
second before and after are compared, and a shift that did not pay is undone and not tried again for a while; nor is one, either
way, for which there was no memory. Pure: no clock, no engine.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from pasture.core.values import Form

SHORT_SECONDS = 3.0
"""requests must have been short of cells for so long"""
AMPLE_SECONDS = 20.0
"""what runs and waits must have fitted into the larger cells for so long"""
AMPLE_SHARE = 0.7
"""of the cells that there are without the shift"""
TRIAL_SECONDS = 15.0
"""of steps on either side of a shift that are compared"""
LOSS = 0.95
"""a shift must leave at least this much of the tokens a second"""
BAN_SECONDS = 600.0
"""before a shift that did not pay, or could not be made, is tried again"""


@dataclass(frozen=True, slots=True)
class Demand:
    """What the cells have to hold at this moment."""

    short: bool
    """a request had to wait, or was swapped out, for lack of cells since the last look"""
    needed_cells: int
    """of everything that runs, waits, or is swapped out"""


class Shifter:
    def __init__(self, form: Form | None, raw_cells: int) -> None:
        """`form`: what to shift down to; None: never. `raw_cells`: cells of the pool as it was started."""
        self._form = form
        self._raw_cells = raw_cells
        self._short_since: float | None = None
        self._ample_since: float | None = None
        self._banned_until = self._refused_until = float("-inf")
        self._shifted_at: float | None = None
        self._rate_before = 0.0
        self._steps: deque[tuple[float, float, int]] = deque()
        """(when, seconds, tokens) of the latest steps"""

    def observe(self, now: float, seconds: float, n_tokens: int) -> None:
        """A step has run."""
        self._steps.append((now, seconds, n_tokens))
        while self._steps and now - self._steps[0][0] > TRIAL_SECONDS:
            self._steps.popleft()

    def advise(self, form: Form, demand: Demand, now: float) -> Form | None:
        """The form to shift to now; None to stay."""
        if self._form is None or now < self._refused_until:
            return None
        return self._down(demand, now) if form is Form.RAW else self._up(demand, now)

    def shifted(self, form: Form, now: float) -> None:
        """The cache has been rebuilt in this form."""
        if form is not Form.RAW:
            self._rate_before, self._shifted_at = self._rate(), now
        else:
            self._shifted_at = None
        self._short_since = self._ample_since = None
        self._steps.clear()

    def refuse(self, now: float) -> None:
        """It could not be rebuilt: not again for a while, wherever to."""
        self._refused_until = now + BAN_SECONDS
        self._short_since = self._ample_since = None

    def _down(self, demand: Demand, now: float) -> Form | None:
        if not demand.short:
            if demand.needed_cells <= self._raw_cells:
                self._short_since = None
            return None
        if self._short_since is None:
            self._short_since = now
        ready = now - self._short_since >= SHORT_SECONDS and now >= self._banned_until
        return self._form if ready else None

    def _up(self, demand: Demand, now: float) -> Form | None:
        if self._shifted_at is not None and now - self._shifted_at >= TRIAL_SECONDS:
            self._shifted_at = None
            if 0 < self._rate() < self._rate_before * LOSS:
                self._banned_until = now + BAN_SECONDS
                return Form.RAW
        if demand.short or demand.needed_cells > AMPLE_SHARE * self._raw_cells:
            self._ample_since = None
            return None
        if self._ample_since is None:
            self._ample_since = now
        return Form.RAW if now - self._ample_since >= AMPLE_SECONDS else None

    def _rate(self) -> float:
        """Tokens a second of the latest steps; 0 when there were none."""
        seconds = sum(step[1] for step in self._steps)
        return sum(step[2] for step in self._steps) / seconds if seconds else 0.0
