"""Frozen pictures of the stateful objects. Metrics, `/props`, `/slots` and the dashboard read these and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from pasture.core.storage import StoreStatistics
from pasture.core.values import Form, ModelInfo, Namespace, PoolShape, RequestId, SeqId

MAX_PREFIXES = 200
"""of the prefix tree, in one picture of it"""
_SHARE_OF_F16 = {Form.RAW: 1.0, Form.LOSSLESS: 1.0, Form.Q8_0: 34 / 64, Form.Q4_0: 18 / 64}


class SequenceState(StrEnum):
    PREFILLING = "prefilling"
    DECODING = "decoding"
    IDLE = "idle"


@dataclass(frozen=True, slots=True)
class Verification:
    """Restored KV that was read back from the live cache, and compared with what was stored."""

    compared_tokens: int = 0
    differing_tokens: int = 0

    def __add__(self, other: Verification) -> Verification:
        return Verification(self.compared_tokens + other.compared_tokens, self.differing_tokens + other.differing_tokens)


@dataclass(frozen=True, slots=True)
class SequenceStatistics:
    sequence: SeqId
    namespace: Namespace
    state: SequenceState
    n_tokens: int
    shared_tokens: int
    """of n_tokens, those in cells that another sequence holds too"""
    idle_seconds: float
    request_id: RequestId | None
    prefix: int | None = None
    """the number of the prefix in which it ends"""


@dataclass(frozen=True, slots=True)
class PrefixStatistics:
    """A stretch of tokens `[start, start + n_tokens)` that the same sequences hold: one node of the pool's prefix tree."""

    number: int
    parent: int | None
    """None: nothing comes before it"""
    namespace: Namespace
    start: int
    n_tokens: int
    holders: int
    running: int
    """of the holders, those that are not idle"""
    idle_seconds: float
    """since anybody last used it; 0 while somebody runs on it"""
    hits: int
    """requests that found it in the live cache when they came"""
    tokens: Sequence[int] = field(repr=False)
    """a copy: what people wrote, so it goes nowhere but to an administrator, and at an ingress there are none"""
    replica: str | None = None
    """of a cluster, the one whose live cache it is in"""

    def own(self, n_tokens: int) -> int:
        """How many of its tokens are among so many from the beginning of its conversation."""
        return min(self.n_tokens, max(0, n_tokens - self.start))


@dataclass(frozen=True, slots=True)
class PrefixContent:
    """What a node of the prefix tree says, for an administrator, and how much of it tiers hold too."""

    tokens: tuple[int, ...] = field(repr=False)
    """its first"""
    n_tokens: int
    """of all of it"""
    ram_tokens: int
    slow_tokens: Mapping[str, int]
    """in each slow tier, by its name"""


@dataclass(frozen=True, slots=True)
class NamespaceStatistics:
    namespace: Namespace
    cells: int
    shared_cells: int
    sequences: int
    hit_tokens: int
    missed_tokens: int


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """Cells: used = running + idle; shared is a part of used. All counts are of cells unless named otherwise."""

    shape: PoolShape
    used_cells: int
    running_cells: int
    idle_cells: int
    shared_cells: int
    saved_cells: int
    """cells that every holder beyond the first would have needed: sum of (holders - 1) over the shared cells"""
    peak_cells: int
    fragmentation: float
    """0..1: neighbouring tokens of a sequence that are not neighbours in the cache, as a share of all"""
    hit_tokens: Mapping[str, int]
    """prompt tokens found, by the state of who held them: running, prefilling, idle, or `stored`"""
    missed_tokens: int
    """prompt tokens that had to be computed"""
    evicted_cells: Mapping[str, int]
    """by reason: cells, sequences, idle, layout, failure"""
    compactions: int
    namespaces: tuple[NamespaceStatistics, ...]
    sequences: tuple[SequenceStatistics, ...]
    prefixes: tuple[PrefixStatistics, ...] = ()
    """the prefix tree, parents before children; of a large one, the part that weighs most"""

    def path_to(self, number: int) -> list[PrefixStatistics]:
        """The prefix of that number and what comes before it, the beginning first; empty where there is none."""
        known = {prefix.number: prefix for prefix in self.prefixes}
        path: list[PrefixStatistics] = []
        step = known.get(number)
        while step is not None:
            path.append(step)
            step = None if step.parent is None else known[step.parent]
        return path[::-1]


@dataclass(frozen=True, slots=True)
class SchedulerStatistics:
    """Counters run since start; `*_seconds` are sums of engine-thread time."""

    waiting: int
    prefilling: int
    decoding: int
    swapped: int
    users: int
    """whose requests these are; as they are queued: by the name that a request gives, else its key, else its address"""
    submitted_total: int
    finished_total: Mapping[str, int]
    """by finish reason"""
    rejected_total: int
    swaps_total: int
    prompt_tokens_total: int
    cached_tokens_total: int
    computed_tokens_total: int
    ahead_tokens_total: int
    """computed while nobody asked for anything, for prompts that were expected"""
    generated_tokens_total: int
    steps_total: int
    interrupted_steps_total: int
    """given up for a request that came: what they had computed was computed again"""
    step_seconds_total: float
    decode_seconds_total: float
    """inside llama_decode; step_seconds_total - decode_seconds_total is pasture's own share"""
    sample_seconds_total: float
    prefill_budget_tokens: int
    prefill_tokens_per_second: float
    layout_moves_total: int
    shifts_total: int
    """rewritings of the live cells in another form"""
    invariant_failures_total: int


@dataclass(frozen=True, slots=True)
class ServiceStatistics:
    model: ModelInfo
    pool: PoolStatistics
    scheduler: SchedulerStatistics
    store: StoreStatistics
    uptime_seconds: float
    draining: bool

    @property
    def live_bytes(self) -> int:
        """Of the pool's buffers; a cache shifted down counts as f16 in its present form."""
        shape = self.pool.shape
        return round(shape.n_cells * self.model.cell_bytes * _SHARE_OF_F16[shape.form])

    @property
    def annex_bytes(self) -> int:
        """Of the cache beside the pool in which prompts are computed."""
        return self.pool.shape.annex_cells * self.model.cell_bytes
