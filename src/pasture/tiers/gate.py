"""Where a transfer beats recomputing, by what was measured here.

    fetch   RAM -> live, or slow tier -> RAM -> live      pays when reading and restoring take less than computing
    spill   live -> RAM, or RAM -> slow tier              pays when the copy costs less than its return is expected to save

Rates are decaying sums of what was moved over what it took, so large transfers weigh more than small ones, and one odd sample
fades. Until something is measured, priors hold that favour tiers on ordinary hardware: an optimist that soon learns.

A gate that refuses learns nothing, so a refusal ages: what would lose at most a small share of the time since anything of its
kind was let through is tried, and measured again. So one slow moment does not close the gate for good, however slow it was, and
where transfers do lose, trying costs that share at most. Knows no tier and no block. Any thread; one short lock. The idea of
comparing both costs: LMCache, CacheGen, vLLM's connectors.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pasture.core.ports import Clock
from pasture.core.values import Direction, Form, Transfer

MIB = 1 << 20
PRIOR_PREFILL_TOKENS_PER_SECOND = 1000.0
PRIOR_COPY_BYTES_PER_SECOND = 2e9
"""into and out of the live cache"""
PRIOR_READ_BYTES_PER_SECOND = 500e6
PRIOR_READ_SECONDS = 1e-3
"""latency of a slow tier nobody has asked yet"""
PRIOR_CELL_BYTES = 64 * 1024
USUAL_FETCH_TOKENS = 1024
"""that are read together: a part of a conversation"""
CALL_SECONDS = 2e-4
"""one save or restore, however small"""
RETURN_PROBABILITY = 0.25
"""that what is stored is asked for again before it is evicted; conversations go on and system prompts return more often"""
STALE_DESCRIPTIONS = 10
"""of a tier without a read, from which on its own figures count again: what was slow then may not be so any more"""
TRIED_SHARE = 0.01
"""of the time since a transfer of its kind, that one may lose which does not seem to pay"""
MOST_TRIED_SECONDS = 2.0
"""that one may lose at most, after however long a time"""
PRIOR_COPY_TOKENS = 64
"""what is assumed of copies counts as much as having seen so many tokens copied"""
_PRIOR_BYTES = 4 * MIB
"""the same for reads and for unpacking"""
_KEPT = 0.9
"""share of the past that stays when a sample comes in"""
_PRIOR_UNPACK = {Form.RAW: 20e9, Form.LOSSLESS: 400e6, Form.Q8_0: 1e9, Form.Q4_0: 1e9}
"""bytes of payload a second from the form at rest to what a restore takes"""


class Rate:
    """Units a second, from decaying sums that begin with a prior's."""

    def __init__(self, prior_per_second: float, prior_units: float = _PRIOR_BYTES) -> None:
        self._units = prior_units
        self._seconds = prior_units / prior_per_second

    def observe(self, units: float, seconds: float) -> None:
        if units > 0 and seconds > 0:
            self._units = _KEPT * self._units + units
            self._seconds = _KEPT * self._seconds + seconds

    @property
    def per_second(self) -> float:
        return self._units / self._seconds


@dataclass(frozen=True, slots=True)
class GateFigures:
    prefill_tokens_per_second: float
    save_bytes_per_second: float
    restore_bytes_per_second: float
    refusals: Mapping[str, int]


class Gate(Protocol):
    """Asked before anything moves. `n_tokens` is what would have to be recomputed otherwise."""

    def fetch(self, n_tokens: int, stored: Mapping[Form, int]) -> bool:
        """RAM -> live; `stored`: payload bytes by form."""
        ...

    def fetch_slow(self, tier: str, n_tokens: int) -> bool:
        """Slow tier -> RAM -> live."""
        ...

    def spill(self, n_tokens: int) -> bool:
        """Live -> RAM."""
        ...

    def refuses_spill(self, n_tokens: int) -> bool:
        """Whether `spill` would refuse so many, counted as its refusals are; otherwise nothing is let through yet."""
        ...

    def spill_slow(self, tier: str, n_tokens: int, n_bytes: int) -> bool:
        """RAM -> slow tier, in the background."""
        ...

    def recompute_seconds(self, n_tokens: int) -> float: ...
    def stored_bytes(self, n_tokens: int) -> int:
        """What so many tokens will probably take in RAM."""
        ...

    def observe(self, transfers: Sequence[Transfer]) -> None: ...
    def observe_prefill(self, tokens_per_second: float) -> None: ...
    def observe_unpack(self, form: Form, n_bytes: int, seconds: float) -> None: ...
    def observe_read(self, tier: str, n_bytes: int, seconds: float) -> None: ...
    def describe_tier(self, tier: str, latency_seconds: float, bytes_per_second: float) -> None:
        """What the tier has measured of itself; zero: nothing. Its bandwidth counts while no read is measured here."""
        ...

    def figures(self) -> GateFigures: ...


@dataclass(slots=True)
class _SlowTier:
    latency_seconds: float
    rate: Rate
    stale: int | None = None
    """descriptions since the last read that was measured; None: none was"""


class CostGate:
    """See the module. `cell_bytes`: KV of a token in the live cache, where it is known beforehand. `clock` is monotonic."""

    def __init__(
        self, cell_bytes: int = 0, return_probability: float = RETURN_PROBABILITY, clock: Clock = time.monotonic
    ) -> None:
        self._return_probability = return_probability
        self._clock = clock
        self._since = clock()
        self._lock = threading.Lock()
        self._prefill = PRIOR_PREFILL_TOKENS_PER_SECOND
        self._cell_bytes = float(cell_bytes or PRIOR_CELL_BYTES)
        n_bytes = PRIOR_COPY_TOKENS * self._cell_bytes
        self._rates = {direction: Rate(PRIOR_COPY_BYTES_PER_SECOND, n_bytes) for direction in Direction}
        self._unpack = {form: Rate(rate) for form, rate in _PRIOR_UNPACK.items()}
        self._tiers: dict[str, _SlowTier] = {}
        self._refusals: Counter[str] = Counter()
        self._let_through: dict[str, float] = {}
        """kind of transfer -> when the last was"""

    # Decisions

    def fetch(self, n_tokens: int, stored: Mapping[Form, int]) -> bool:
        return self._decide("fetch", self.saving_of_fetch(n_tokens, stored), "fetch")

    def fetch_slow(self, tier: str, n_tokens: int) -> bool:
        return self._decide("fetch", self.saving_of_slow_fetch(tier, n_tokens), f"fetch from {tier}")

    def spill(self, n_tokens: int) -> bool:
        return self._decide("spill", self.saving_of_spill(n_tokens), "spill")

    def spill_slow(self, tier: str, n_tokens: int, n_bytes: int) -> bool:
        reading = n_bytes / self._tier(tier).rate.per_second
        saving = self.recompute_seconds(n_tokens) - reading - self._restore_seconds(n_tokens)
        return self._decide("spill", saving, None)  # a write tells nothing of what it is judged by

    def refuses_spill(self, n_tokens: int) -> bool:
        saving = self.saving_of_spill(n_tokens)
        with self._lock:
            refused = not self._allows(saving, "spill", self._clock())
            if refused:
                self._refusals["spill"] += 1
            return refused

    def _decide(self, kind: str, saving_seconds: float, tried_as: str | None) -> bool:
        """`tried_as`: what it is one of when a refusal has aged; None: of nothing that trying would teach."""
        now = self._clock()
        with self._lock:
            allowed = self._allows(saving_seconds, tried_as, now)
            if not allowed:
                self._refusals[kind] += 1
            elif tried_as is not None:
                self._let_through[tried_as] = now
            return allowed

    def _allows(self, saving_seconds: float, tried_as: str | None, now: float) -> bool:
        if saving_seconds > 0 or tried_as is None:
            return saving_seconds > 0
        since = now - self._let_through.get(tried_as, self._since)
        return -saving_seconds <= min(TRIED_SHARE * since, MOST_TRIED_SECONDS)

    # Expected savings in seconds; negative where recomputing wins

    def saving_of_fetch(self, n_tokens: int, stored: Mapping[Form, int]) -> float:
        unpacking = sum(n_bytes / self._unpack[form].per_second for form, n_bytes in stored.items())
        return self.recompute_seconds(n_tokens) - CALL_SECONDS - unpacking - self._restore_seconds(n_tokens)

    def saving_of_slow_fetch(self, tier: str, n_tokens: int) -> float:
        slow = self._tier(tier)
        reading = slow.latency_seconds + self.stored_bytes(n_tokens) / slow.rate.per_second
        return self.recompute_seconds(n_tokens) - CALL_SECONDS - reading - self._restore_seconds(n_tokens)

    def saving_of_spill(self, n_tokens: int) -> float:
        saving = CALL_SECONDS + n_tokens * self._cell_bytes / self._rates[Direction.SAVE].per_second
        returning = self.recompute_seconds(n_tokens) - CALL_SECONDS - self._restore_seconds(n_tokens)
        return self._return_probability * returning - saving

    def recompute_seconds(self, n_tokens: int) -> float:
        return n_tokens / self._prefill

    def fetch_price(self, tiers: Sequence[str]) -> float:
        """What a token takes to be read from the fastest of these tiers, where computing it takes 1; infinite without any."""
        found = [self._tier(tier) for tier in tiers]
        n_bytes = self.stored_bytes(USUAL_FETCH_TOKENS)
        reading = (slow.latency_seconds + n_bytes / slow.rate.per_second for slow in found)
        return min(reading, default=math.inf) / self.recompute_seconds(USUAL_FETCH_TOKENS)

    def stored_bytes(self, n_tokens: int) -> int:
        return int(n_tokens * self._cell_bytes)

    def _restore_seconds(self, n_tokens: int) -> float:
        return n_tokens * self._cell_bytes / self._rates[Direction.RESTORE].per_second

    # Measurements

    def observe(self, transfers: Sequence[Transfer]) -> None:
        with self._lock:
            for transfer in transfers:
                self._rates[transfer.direction].observe(transfer.n_bytes, transfer.seconds)
                if transfer.n_tokens > 0 and transfer.n_bytes > 0:
                    self._cell_bytes += (transfer.n_bytes / transfer.n_tokens - self._cell_bytes) * (1 - _KEPT)

    def observe_prefill(self, tokens_per_second: float) -> None:
        if tokens_per_second > 0:
            self._prefill = tokens_per_second

    def observe_unpack(self, form: Form, n_bytes: int, seconds: float) -> None:
        with self._lock:
            self._unpack[form].observe(n_bytes, seconds)

    def observe_read(self, tier: str, n_bytes: int, seconds: float) -> None:
        slow = self._tier(tier)
        with self._lock:
            slow.stale = 0
            slow.rate.observe(n_bytes, max(seconds - slow.latency_seconds, seconds / 10))

    def describe_tier(self, tier: str, latency_seconds: float, bytes_per_second: float) -> None:
        slow = self._tier(tier)
        if latency_seconds > 0:
            slow.latency_seconds = latency_seconds
        with self._lock:
            if slow.stale is not None:
                slow.stale += 1
            if bytes_per_second > 0 and (slow.stale is None or slow.stale > STALE_DESCRIPTIONS):
                slow.rate = Rate(bytes_per_second)

    def _tier(self, name: str) -> _SlowTier:
        with self._lock:
            if name not in self._tiers:
                self._tiers[name] = _SlowTier(PRIOR_READ_SECONDS, Rate(PRIOR_READ_BYTES_PER_SECOND))
            return self._tiers[name]

    def figures(self) -> GateFigures:
        with self._lock:
            return GateFigures(
                self._prefill,
                self._rates[Direction.SAVE].per_second,
                self._rates[Direction.RESTORE].per_second,
                dict(self._refusals),
            )


class OpenGate(CostGate):
    """Measures as `CostGate` does, and lets everything through."""

    def refuses_spill(self, n_tokens: int) -> bool:
        return False

    def _decide(self, kind: str, saving_seconds: float, tried_as: str | None) -> bool:
        return True
