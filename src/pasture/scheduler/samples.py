"""Pieces of what was restored, remembered as they came out of the store, and compared with what the live cache holds there.

    restored       a few tokens of one slab are kept; the slab is another one each time
    read_back      has the next operations save the same positions of every sequence that still holds them
    saved          compares what the engine gave, to the byte

What the engine writes down as KV it must hold as KV, whatever form it was stored in, until the sequence gives the positions up
or all cells are rewritten in another form. Only where a part of a state can be read by itself. Engine thread.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pasture.core.statistics import Verification
from pasture.core.storage import Bytes, SlabCodec
from pasture.core.values import Slab
from pasture.kv.pool import Pool
from pasture.kv.sequence import Sequence

log = logging.getLogger(__name__)

SAMPLE_TOKENS = 8
MAX_SAMPLES = 8
"""sequences of which one is kept, those restored last"""


@dataclass(frozen=True, slots=True)
class _Sample:
    p0: int
    p1: int
    payload: Bytes


class Samples:
    def __init__(self, pool: Pool, codec: SlabCodec) -> None:
        self._pool = pool
        self._codec = codec
        self._samples: dict[Sequence, _Sample] = {}
        self._reading: dict[int, _Sample] = {}
        """key of a Save that is under way -> what it must give"""
        self._n_restored = 0
        self._found = Verification()

    def restored(self, sequence: Sequence, slabs: tuple[Slab, ...]) -> None:
        """These are to be written into the sequence's cells."""
        if not self._pool.cuttable:
            return
        self._n_restored += 1
        slab = slabs[self._n_restored % len(slabs)]
        p1 = min(slab.p0 + SAMPLE_TOKENS, slab.p1)
        self.forget(sequence)
        self._samples[sequence] = _Sample(slab.p0, p1, self._codec.pack(slab.cut(slab.p0, p1)))
        if len(self._samples) > MAX_SAMPLES:
            del self._samples[next(iter(self._samples))]

    def forget(self, sequence: Sequence) -> None:
        """The sequence gives up cells."""
        self._samples.pop(sequence, None)

    def clear(self) -> None:
        """All cells are written in another form, or gone."""
        self._samples.clear()
        self._reading.clear()

    def read_back(self) -> None:
        """Begin anew to compare all that is still there; `found` has the outcome when the operations are carried out."""
        self._found = Verification()
        live = self._pool.sequences
        self._samples = {sequence: one for sequence, one in self._samples.items() if live.get(sequence.id) is sequence}
        self._reading = {self._pool.save(sequence, one.p0, one.p1): one for sequence, one in self._samples.items()}

    def saved(self, slabs: Mapping[int, Slab]) -> None:
        """What the engine has saved, among it what was to be read back."""
        for key in self._reading.keys() & slabs.keys():
            sample = self._reading.pop(key)
            same = np.array_equal(self._codec.pack(slabs[key]), sample.payload)
            if not same:
                log.error("the KV at [%d, %d) of a sequence is not what was restored there", sample.p0, sample.p1)
            n_tokens = sample.p1 - sample.p0
            self._found += Verification(n_tokens, 0 if same else n_tokens)

    @property
    def found(self) -> Verification:
        """The outcome of the last comparison."""
        return self._found
