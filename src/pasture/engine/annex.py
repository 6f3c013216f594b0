"""A small cache beside the live one, in which prompts are computed where the live one is so full that they would be slow in it.

llama.cpp's tiled attention on CPUs looks at the mask of every cell in use before it skips those of others: for each head of
each layer, for each row. In a large pool that takes several times as long as the prompt itself (SmolLM2, two cores, 448 tokens
behind 768: 0.7 to 1.1 s alone, about 2 s beside 12,000 cells of others, 3.4 s beside 32,000). Here a prompt is alone:

    live cache   ... [ A ][ B ][ prefix of C ]......[ C's new tokens ] ...
                               |  moved in                ^  moved out
    annex                    [ prefix of C ][ new tokens computed ]

What it holds stays, so that the next chunk of the same prompt moves out alone. Owns a `Context` of one sequence. Engine thread.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pasture.core.errors import EngineError
from pasture.core.values import CellOperation, Remove, SeqId, Work
from pasture.engine.bindings import DECODED, NO_SLOT
from pasture.engine.context import Context, Piece
from pasture.engine.transfer import PartTransfer

_SEQUENCE = SeqId(0)


@dataclass(frozen=True, slots=True)
class Computed:
    """What became of one work."""

    code: int
    """llama_decode's, or NO_SLOT where the live cache had no room; only after DECODED has anything changed in it"""
    decode_seconds: float
    moving_seconds: float
    logits: NDArray[np.float32]
    """after the last token, `(1, n_vocab)`, where the work draws; else `(0, n_vocab)`; valid until the next work"""


class Annex:
    def __init__(self, context: Context, transfer: PartTransfer) -> None:
        """`transfer` moves parts into `context` and out of it."""
        self._context = context
        self._transfer = transfer
        self._holder: SeqId | None = None
        """of the live cache's sequences, the one whose beginning is here"""

    @property
    def n_cells(self) -> int:
        return self._context.shape.n_cells

    def heed(self, operation: CellOperation) -> None:
        """The live cache is about to change so; what is here may not be what it holds any more."""
        if isinstance(operation, Remove) and operation.sequence == self._holder:  # whatever else changes makes it longer
            self.forget()

    def forget(self) -> None:
        """Be empty."""
        self._context.remove(_SEQUENCE)
        self._holder = None

    def compute(self, work: Work, live: PartTransfer) -> Computed:
        """One work here, its KV into the live cache, which is as it was in every case but success."""
        began = time.perf_counter()
        end = work.start + len(work.tokens)
        if end > self.n_cells or len(work.tokens) > self._context.shape.n_batch:
            raise EngineError(f"{len(work.tokens)} tokens up to position {end} in an annex of {self.n_cells} cells")
        if self._holder != work.sequence or self._context.length(_SEQUENCE) != work.start:
            self.forget()
            if work.start:
                self._transfer.restore(_SEQUENCE, [live.save(work.sequence, 0, work.start)])
        self._holder = None  # until this has succeeded
        moving_seconds = time.perf_counter() - began
        pad_to = min(self._context.shape.tile_tokens, self.n_cells - work.start)
        piece = Piece(_SEQUENCE, work.tokens, work.start, wants_logits=work.sampler is not None)
        code, decode_seconds = self._context.decode([piece], pad_to)
        if code == DECODED:
            began = time.perf_counter()
            try:
                live.restore(work.sequence, [self._transfer.save(_SEQUENCE, work.start, end)])
                self._holder = work.sequence
            except EngineError:
                code = NO_SLOT
            moving_seconds += time.perf_counter() - began
        wants_logits = code == DECODED and work.sampler is not None
        return Computed(code, decode_seconds, moving_seconds, self._context.logits(int(wants_logits)))

    def close(self) -> None:
        self._context.close()
