"""Which layout suits the traffic: one buffer for all, or one stream a sequence.

In the unified layout every row walks over every used cell and skips those of others; in streams it walks over its own, but a
shared prefix is read (and kept) once a sequence. With `a` the cells a row attends to, `N` the used cells, `A` the sum of the
active sequences' lengths over `R` rows and `D` their distinct tokens:

    unified, a row:  base + attend * a + mask * (N - a)
    streams, a row:  base + attend * a + copy * (A - D) / R

The coefficients only matter as ratios; they start as measured on a CPU. What a move really changed is measured around it and
kept as a correction, so a machine on which the estimate is wrong is moved once and not again. Pure: no clock, no engine.
"""

from __future__ import annotations

from dataclasses import dataclass

from pasture.core.values import Layout, PoolShape

BASE, ATTEND, MASK, COPY = 3000.0, 3.3, 0.34, 1.7
"""microseconds a row and a row and cell: SmolLM2-135M Q4_1 on two cores"""
GAIN = 0.12
"""a move to streams must promise this much of a row's time"""
MIN_ROWS = 4
"""so many must run: the last few of a wave are done before a move, of a second or two, has paid"""
LOSS = 0.03
"""streams that cost this much more than the unified layout would are left"""
SETTLE_STEPS = 24
"""steps on either side of a move that are compared; also the least between two moves"""
SPARE = 1.25
"""a stream should have room for this many times the conversation expected in it"""
MIN_STREAMS = 16


@dataclass(frozen=True, slots=True)
class Traffic:
    """The requests that run, wait to run, or are swapped out."""

    rows: int
    attended_cells: int
    """sum of their lengths, with some of the reply to come"""
    distinct_cells: int
    """tokens of all of them, shared prefixes once"""
    idle_cells: int
    """cells of nobody who runs, walked over all the same in the unified layout"""
    longest_tokens: int
    n_ids: int
    """one more than the highest sequence id that runs or did so lately"""

    def row_cost(self, layout: Layout) -> float:
        """Estimated microseconds a row."""
        own = self.attended_cells / self.rows
        if layout is Layout.UNIFIED:
            return BASE + ATTEND * own + MASK * max(0.0, self.distinct_cells + self.idle_cells - own)
        return BASE + ATTEND * own + COPY * max(0, self.attended_cells - self.distinct_cells) / self.rows


@dataclass(frozen=True, slots=True)
class Target:
    layout: Layout
    n_seqs: int


class LayoutAdvisor:
    def __init__(self, home: PoolShape) -> None:
        self._home = home
        """the unified shape that the server started with"""
        self._correction = 1.0
        """measured cost of streams against unified, over the estimated one"""
        self._ratios: list[float] = []
        """measured over estimated seconds of the latest steps in this layout"""
        self._before: float | None = None
        self._steps_here = SETTLE_STEPS

    def observe(self, layout: Layout, traffic: Traffic, n_tokens: int, seconds: float) -> None:
        """A step's measured cost, with the traffic it served."""
        self._steps_here += 1
        self._ratios.append(seconds / n_tokens / traffic.row_cost(layout))
        if len(self._ratios) > SETTLE_STEPS:
            del self._ratios[0]
        if self._before is not None and len(self._ratios) == SETTLE_STEPS:
            change = min(2.0, max(0.5, _median(self._ratios) / self._before))
            self._correction *= (change if layout is Layout.STREAMS else 1 / change) ** 0.5
            self._correction = min(2.0, max(0.5, self._correction))
            self._before = None

    def moved(self) -> None:
        """The pool has just been laid out anew."""
        self._before = _median(self._ratios) if len(self._ratios) >= SETTLE_STEPS else None
        self._ratios.clear()
        self._steps_here = 0

    def advise(self, shape: PoolShape, traffic: Traffic) -> Target | None:
        """Where to move; None to stay. Cramped streams are always left, what does not fit is never advised."""
        streams = self._streams_for(traffic)
        home = Target(Layout.UNIFIED, self._home.n_seqs)
        if shape.layout is Layout.STREAMS:
            cramped = traffic.longest_tokens >= shape.cells_per_sequence or traffic.rows > shape.n_seqs
            if cramped:
                return streams if streams is not None and streams.n_seqs != shape.n_seqs else home
        if self._steps_here < SETTLE_STEPS:
            return None
        gain = self._gain_of_streams(traffic)
        if shape.layout is Layout.UNIFIED and streams is not None and gain > GAIN and traffic.rows >= MIN_ROWS:
            return streams
        if shape.layout is Layout.STREAMS and gain < -LOSS:
            return home
        return None

    def _gain_of_streams(self, traffic: Traffic) -> float:
        """Share of a row's time that streams would save; negative when they would cost."""
        unified = traffic.row_cost(Layout.UNIFIED)
        streams = traffic.row_cost(Layout.STREAMS) * self._correction
        return 1 - streams / unified if streams < unified else unified / streams - 1

    def _streams_for(self, traffic: Traffic) -> Target | None:
        """Enough streams, each long enough for the longest conversation; None when the cells do not suffice."""
        n_seqs = MIN_STREAMS
        while n_seqs < max(traffic.rows, traffic.n_ids):
            n_seqs *= 2
        if n_seqs > self._home.n_seqs or self._home.n_cells // n_seqs < traffic.longest_tokens * SPARE:
            return None
        return Target(Layout.STREAMS, n_seqs)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
