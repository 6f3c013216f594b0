"""What a step costs on this machine, learnt from every step, and what follows: its shape.

A step's cost is linear in what it does, but with different coefficients in different regimes:

    row by row   fewer rows than a tile: each row walks over the cells it attends to, and skips the others
    tiled        a tile of rows (64 on CPUs) or more: attention is a matrix product over every cell that any row of the tile
                 attends to, several times cheaper a row; but on CPUs each row looks over the mask of all cells in use
    annex        tiled, in a cache where nobody else's cells are; moving there and back takes time too
    streams      decode rows row by row, prompts in a micro-batch of their own

So a prompt's chunk should bring the step up to a full tile, a step that falls somewhat short of one is cheaper filled up with
rows that nobody reads, and streams whose cells are not the prompt's are cheaper in a batch of their own than in its tile,
which would then walk over their cells too; and in a full pool a prompt is cheaper in the annex. On a backend without the cliff
(`tile_tokens` 1) everything is the tiled regime. Coefficients are fitted by least squares with forgetting; the start values
are a CPU's. Knows no clock and no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from pasture.core.values import Layout, PoolShape

FORGETTING = 0.98
RATE_KEPT = 0.95
"""share of the past that stays in the prefill rate with every step that computes prompts"""
PRIOR_TOKENS_PER_SECOND = 300.0
"""a small model on two cores"""
MIN_PROMPT_TOKENS = 32
"""prefill never stops altogether: a full house of streams must not shut out newcomers"""
QUIET_FACTOR = 2.0
"""a step without streams may take this many targets: long enough to compute well, short enough to let newcomers in"""
BRIEF_FACTOR = 0.5
"""of the target, for a step that somebody who comes now should not wait for: a tile, where that takes as long"""
MOST_PATIENCE = 3.0
"""targets that a step may take at most, where this many times as many of a tenant wait for their first token as stream"""
BUSY_FACTOR = 2.0
"""where the streams alone take longer than the target, prompts get as much time again, so that newcomers are not starved"""
PAD_GAIN = 0.9
"""filling up must promise to take at most this share of the time"""
APART_GAIN = 0.95
"""a batch of their own for the streams, or the annex, must promise to take at most this share of the time a prompt token"""
MOVING_KEPT = 0.9
"""share of the past that stays in the time of moving a cell"""
PRIOR_MOVING_SECONDS = 10e-6
"""a cell, out of one cache and into the other"""


@dataclass(frozen=True, slots=True)
class Load:
    """What one batch computes."""

    rows: int
    """streams, one token each"""
    prompt_tokens: int
    attended_cells: int
    """sum over rows and prompt tokens of the cells before each; in the streams layout over the rows alone"""
    distinct_cells: int
    """that any of them attends to: what a tile with all of them walks over"""
    prompt_cells: int
    """of these, what the prompts attend to: what a tile of prompt tokens alone walks over"""
    used_cells: int = 0
    """of the whole cache: a row of a tile looks at the mask of each"""

    @property
    def n_tokens(self) -> int:
        return self.rows + self.prompt_tokens


@dataclass(frozen=True, slots=True)
class AnnexLoad:
    """What one prompt computes in the annex."""

    n_tokens: int
    start: int
    """the cells before them, which are moved there"""


class _Place(Enum):
    """Where a step computes a prompt."""

    TOGETHER = auto()
    """in one batch with the streams"""
    APART = auto()
    ANNEX = auto()


class _Linear:
    """Least squares with forgetting; coefficients never below zero.

    What the start values say is never forgotten, only outweighed: where all steps are alike (somebody writes alone), they say
    nothing of how the time divides among the features, and without that the shares would drift to anything that adds up.
    Plain numbers: after a step has emptied the processor's caches, numpy takes half a millisecond for three equations.
    """

    def __init__(self, start: Sequence[float], spread: Sequence[float]) -> None:
        self._weights = list(start)
        self._prior = [1 / each**2 for each in spread]
        self._prior_moment = [weight * precision for weight, precision in zip(start, self._prior, strict=True)]
        self._precision = [[p if i == j else 0.0 for j in range(len(start))] for i, p in enumerate(self._prior)]
        self._moment = list(self._prior_moment)
        self._n_seen = 0

    def predict(self, features: Sequence[float]) -> float:
        return sum(weight * x for weight, x in zip(self._weights, features, strict=True))

    def learn(self, features: Sequence[float], seconds: float) -> None:
        """Far outliers (a machine that stalled) are drawn in before they are learnt from."""
        expected = self.predict(features)
        if self._n_seen > 8 and expected > 0:
            seconds = min(max(seconds, expected / 3), expected * 3)
        certainty = 1 / (0.1 * max(expected, 0.01)) ** 2
        for i, (row, x) in enumerate(zip(self._precision, features, strict=True)):
            for j, y in enumerate(features):
                row[j] = FORGETTING * row[j] + certainty * x * y
            row[i] += (1 - FORGETTING) * self._prior[i]
            remembered = FORGETTING * self._moment[i] + (1 - FORGETTING) * self._prior_moment[i]
            self._moment[i] = remembered + certainty * x * seconds
        self._weights = self._solved()
        self._n_seen += 1

    def _solved(self) -> list[float]:
        """The best coefficients; one that would be negative is nothing, and the others are fitted without it."""
        weights = [1e-7] * len(self._moment)
        used = list(range(len(weights)))
        while used:
            solved = _solve([[self._precision[i][j] for j in used] for i in used], [self._moment[i] for i in used])
            if min(solved) > 0:
                for i, weight in zip(used, solved, strict=True):
                    weights[i] = weight
                break
            used = [i for i, weight in zip(used, solved, strict=True) if weight > 0]
        return weights


def _solve(matrix: list[list[float]], vector: list[float]) -> list[float]:
    """Of a positive definite system; overwrites both."""
    n = len(vector)
    for k in range(n):
        for i in range(k + 1, n):
            factor = matrix[i][k] / matrix[k][k]
            for j in range(k, n):
                matrix[i][j] -= factor * matrix[k][j]
            vector[i] -= factor * vector[k]
    for k in reversed(range(n)):
        vector[k] = (vector[k] - sum(matrix[k][j] * vector[j] for j in range(k + 1, n))) / matrix[k][k]
    return vector


class StepCosts:
    def __init__(self, itl_target_seconds: float) -> None:
        self._target = itl_target_seconds
        self._row_by_row = _Linear([0.008, 0.003, 0.0035], [0.01, 0.003, 0.01])
        self._tiled = _Linear([0.008, 0.003, 0.07, 0.2], [0.01, 0.003, 0.02, 0.2])
        self._streams = _Linear([0.008, 0.003, 0.003, 0.0035], [0.01, 0.003, 0.003, 0.01])
        self._moving_seconds = PRIOR_MOVING_SECONDS
        """a cell"""
        self._prompt_tokens = self._prompt_seconds = 0.0
        """of the latest prompts, fading"""

    def observe(self, shape: PoolShape, load: Load, pad_to: int, seconds: float) -> None:
        """One step's measured seconds."""
        model, features = self._regime(shape, load, max(load.n_tokens, pad_to))
        model.learn(features, seconds)
        if load.prompt_tokens:
            self._keep_rate(load.prompt_tokens, seconds * load.prompt_tokens / load.n_tokens)

    def observe_annex(self, shape: PoolShape, loads: Sequence[AnnexLoad], seconds: float, moving_seconds: float) -> None:
        """What the step's prompts in the annex took, and moving them. The kernels are the pool's: one teaches the other."""
        features = [sum(column) for column in zip(*(_in_annex(shape, load) for load in loads), strict=True)]
        self._tiled.learn(features, seconds)
        n_moved = sum(load.start + load.n_tokens for load in loads)
        self._moving_seconds += (1 - MOVING_KEPT) * (moving_seconds / n_moved - self._moving_seconds)
        self._keep_rate(sum(load.n_tokens for load in loads), seconds + moving_seconds)

    def _keep_rate(self, n_tokens: int, seconds: float) -> None:
        self._prompt_tokens = RATE_KEPT * self._prompt_tokens + n_tokens
        self._prompt_seconds = RATE_KEPT * self._prompt_seconds + seconds

    def expected_seconds(self, shape: PoolShape, load: Load, pad_to: int = 0) -> float:
        model, features = self._regime(shape, load, max(load.n_tokens, pad_to))
        return model.predict(features)

    def annex_seconds(self, shape: PoolShape, load: AnnexLoad) -> float:
        return self._tiled.predict(_in_annex(shape, load)) + self._moving_seconds * (load.start + load.n_tokens)

    def padding(self, shape: PoolShape, load: Load) -> int:
        """Rows to fill the step up to; 0 where that does not pay."""
        if not shape.can_pad or shape.layout is not Layout.UNIFIED or not 1 < load.n_tokens < shape.tile_tokens:
            return 0
        filled = self.expected_seconds(shape, load, shape.tile_tokens)
        return shape.tile_tokens if filled < self.expected_seconds(shape, load) * PAD_GAIN else 0

    def chunk_padding(self, shape: PoolShape, n_tokens: int, start: int) -> int:
        """Tokens to compute behind a short chunk of one stream's prompt, so that it is a tile; 0 where that does not pay."""
        if not shape.can_pad or shape.layout is not Layout.STREAMS or not 1 < n_tokens <= shape.tile_tokens:
            return 0
        tile = shape.tile_tokens + 1  # the first token of every stream makes a micro-batch of its own
        if start + tile > shape.cells_per_sequence:
            return 0
        row_by_row = self._streams.predict((0.0, n_tokens, 0.0, n_tokens * start / 1000))
        tiled = self._streams.predict((0.0, 0.0, tile, 0.0))
        return tile - n_tokens if tiled < row_by_row * PAD_GAIN else 0

    def step(self, shape: PoolShape, streams: Load, prompt: Load, n_waiting: int = 0, *, brief: bool = False) -> int:
        """How many prompt tokens a step with `streams` should take: in their batch, in one of its own, or in the annex.

        `prompt` is a first token of the prompt that goes next: its cells, and (distinct) those of it and the streams together.
        `n_waiting` of the streams' tenant wait for a first token. A longer step computes prompts in fewer tiles, so where they
        are more than the streams, the whole of them gains more from it than the streams lose. `brief`: see `BRIEF_FACTOR`.
        """
        alone = self.expected_seconds(shape, streams) if streams.rows else 0.0
        patience = min(MOST_PATIENCE, max(1.0 if streams.rows else QUIET_FACTOR, n_waiting / max(1, streams.rows)))
        target = self._target * BRIEF_FACTOR if brief else max(self._target * patience, alone * BUSY_FACTOR)
        best = self._grow(shape, streams, prompt, target, _Place.TOGETHER)
        least = (self._with_prompt(shape, streams, prompt, best, _Place.TOGETHER) - alone) / max(1, best) * APART_GAIN
        for place in self._other_places(shape, streams, prompt):
            n_tokens = self._grow(shape, streams, prompt, target, place)
            each = (self._with_prompt(shape, streams, prompt, n_tokens, place) - alone) / max(1, n_tokens)
            if each < least:
                best, least = n_tokens, each
        return best

    def _other_places(self, shape: PoolShape, streams: Load, prompt: Load) -> list[_Place]:
        """Than together."""
        places = []
        if streams.rows and shape.can_pad and shape.layout is Layout.UNIFIED:
            places.append(_Place.APART)
        if prompt.prompt_cells + shape.tile_tokens <= shape.annex_cells:
            places.append(_Place.ANNEX)
        return places

    def _grow(self, shape: PoolShape, streams: Load, prompt: Load, target: float, place: _Place) -> int:
        """Prompt tokens in whole tiles: one at least, more while the step stays within the target."""
        tile = shape.tile_tokens
        most = shape.n_batch - streams.rows
        if place is _Place.ANNEX:
            most = min(most, shape.annex_cells - prompt.prompt_cells)
        if shape.layout is Layout.STREAMS:
            tokens = step = tile + 1 if tile > 1 else MIN_PROMPT_TOKENS
        else:
            step = tile if tile > 1 else MIN_PROMPT_TOKENS
            tokens = max(MIN_PROMPT_TOKENS, tile - streams.rows) if place is _Place.TOGETHER else step
        while tokens + step <= most:
            if self._with_prompt(shape, streams, prompt, tokens + step, place) > target:
                break
            tokens += step
        return max(0, min(tokens, most))

    def _with_prompt(self, shape: PoolShape, streams: Load, prompt: Load, n_tokens: int, place: _Place) -> float:
        """Seconds of a step with `n_tokens` of the prompt."""
        if place is _Place.ANNEX:
            beside = self.expected_seconds(shape, streams) if streams.rows else 0.0
            return beside + self.annex_seconds(shape, AnnexLoad(n_tokens, prompt.prompt_cells))
        attended = 0 if shape.layout is Layout.STREAMS else prompt.attended_cells * n_tokens + n_tokens * n_tokens // 2
        cells, used = prompt.prompt_cells + n_tokens, prompt.used_cells + n_tokens
        if place is _Place.APART:
            alone = self.expected_seconds(shape, Load(0, n_tokens, attended, cells, cells, used), shape.tile_tokens)
            return self.expected_seconds(shape, streams) + alone
        joined = prompt.distinct_cells + n_tokens
        load = Load(streams.rows, n_tokens, streams.attended_cells + attended, joined, cells, used)
        return self.expected_seconds(shape, load)

    @property
    def tokens_per_second(self) -> float:
        """What prompts were computed at lately, tokens over their share of the steps; a guess before the first one."""
        if not self._prompt_seconds:
            return PRIOR_TOKENS_PER_SECOND
        return self._prompt_tokens / self._prompt_seconds

    def _regime(self, shape: PoolShape, load: Load, n_rows: int) -> tuple[_Linear, tuple[float, ...]]:
        if shape.layout is Layout.STREAMS:
            return self._streams, (1.0, load.rows, load.prompt_tokens, load.attended_cells / 1000)
        if n_rows < shape.tile_tokens:
            return self._row_by_row, (1.0, n_rows, load.attended_cells / 1000)
        tiles = -(-n_rows // shape.tile_tokens) if shape.tile_tokens > 1 else n_rows / 64
        walked = load.distinct_cells + max(0.0, tiles - 1) * load.prompt_cells  # the streams are rows of the first tile
        seen = n_rows * load.used_cells if shape.annex_cells else 0
        return self._tiled, (1.0, n_rows, walked / 1000, seen / 1e6)


def _in_annex(shape: PoolShape, load: AnnexLoad) -> tuple[float, ...]:
    """The features of the tiled regime; a short prompt is filled up to a tile."""
    cells = load.start + load.n_tokens
    n_rows = max(load.n_tokens, shape.tile_tokens)
    return (1.0, n_rows, -(-n_rows // shape.tile_tokens) * cells / 1000, n_rows * cells / 1e6)
