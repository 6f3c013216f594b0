"""With which weights a model carries more people on this machine: measured in child processes, once, and kept.

Compared are the file's own and a copy of two bytes a parameter: bf16 where the CPU multiplies that itself, which was quicker
than f16 in everything measured, else f16. Both are loaded in turn, each twice, and the better rates of each count: other work
on the machine disturbs those least. One process measures at a time. Kept are only comparisons that were made; that there was no
room for the copy, or that a child did not answer, is asked again by the next start. The question holds everything that changes
the answer, this module's rule included.
"""

from __future__ import annotations

import logging
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

from pasture.core.errors import ModelError
from pasture.core.values import Layout, Weights
from pasture.engine import bindings, trial, usercache
from pasture.engine.device import has_gpu
from pasture.engine.memory import available_bytes
from pasture.engine.rates import DECODE_SEQUENCES, LONE_FACTOR, PROMPT_TOKENS_A_REPLY_TOKEN, WORTH, DecodeRate, Rates, measure
from pasture.engine.settings import EngineSettings, default_threads
from pasture.engine.weights import expanded_bytes, have_copy, remove_copy

logger = logging.getLogger(__name__)

_WORTH_TRYING_BYTES = 2 << 30
"""a larger copy is made only when it is asked for: it takes long, and who is alone waits for memory"""
_MEMORY_SHARE = 0.25
"""of the free memory, for a copy that nobody asked for"""
_ROUNDS = 2
_CELLS = 1024
_RULE = (WORTH, LONE_FACTOR, PROMPT_TOKENS_A_REPLY_TOKEN, DECODE_SEQUENCES, _ROUNDS)


def choose_weights(settings: EngineSettings) -> tuple[EngineSettings, str]:
    """Settings that the self-check has passed, with their weights chosen where they are AUTO, and what was measured."""
    if settings.weights is not Weights.AUTO:
        return settings, ""
    copy = Weights.BF16 if bindings.multiplies_bf16() else Weights.F16
    as_in_file, written_out = (replace(settings, weights=weights) for weights in (Weights.FILE, copy))
    if not _worth_trying(settings):
        return as_in_file, ""
    try:
        better, because = _compare(as_in_file, written_out)
        if better:
            have_copy(written_out)  # it may have gone since it was measured
    except (ModelError, OSError, subprocess.TimeoutExpired) as error:
        logger.warning("the weights of %s stay as they are in the file: %s", settings.model_path, error)
        return as_in_file, ""
    return (written_out if better else as_in_file), because


def _worth_trying(settings: EngineSettings) -> bool:
    """Whether a CPU computes, the file is mapped, and a copy would be different enough and small enough."""
    if (settings.n_gpu_layers and has_gpu()) or not settings.use_mmap or settings.use_mlock:
        return False
    n_bytes = expanded_bytes(Path(settings.model_path))
    return n_bytes is not None and n_bytes <= min(_WORTH_TRYING_BYTES, _MEMORY_SHARE * available_bytes())


def _compare(as_in_file: EngineSettings, written_out: EngineSettings) -> tuple[bool, str]:
    """Whether the copy is better, and the comparison in words. Raises ModelError where one of both cannot be measured."""
    answer = _answer_file(written_out)
    if (kept := _recall(answer)) is not None:
        return kept
    logger.info("comparing ways to compute with %s", as_in_file.model_path)
    with usercache.alone(answer.parent):
        if (kept := _recall(answer)) is not None:
            return kept
        is_new = have_copy(written_out)
        rounds = [(_rates(as_in_file), _rates(written_out)) for _ in range(_ROUNDS)]
        packed, unpacked = (Rates.best(found) for found in zip(*rounds, strict=True))
        better, because = unpacked.is_better_than(packed), unpacked.beside(packed)
        usercache.remember(answer, {"better": better, "because": because})
        if is_new and not better:
            remove_copy(written_out)  # nobody will ask for it
        return better, because


def _recall(answer: Path) -> tuple[bool, str] | None:
    kept = usercache.recall(answer)
    better, because = kept.get("better"), kept.get("because")
    return (better, because) if isinstance(better, bool) and isinstance(because, str) else None


def _answer_file(settings: EngineSettings) -> Path:
    mark = usercache.model_mark(Path(settings.model_path))
    machine = (usercache.processor(), default_threads(), bindings.BUILD)
    asked = (settings.weights, settings.n_threads, settings.n_threads_batch, settings.use_extra_bufts, settings.flash_attn)
    return usercache.answer_file("weighing", (*mark, *machine, *asked, _RULE))


def _rates(settings: EngineSettings) -> Rates:
    """How quick a child is with these settings. Raises ModelError where it dies of them."""
    n_bytes = trial.file_bytes(settings) + (expanded_bytes(Path(settings.model_path)) or 0)
    answer = trial.run("pasture.engine.weighing", settings, n_bytes)
    if isinstance(answer, trial.Death):
        raise ModelError(answer.reason)
    decode = tuple(DecodeRate(int(rate["sequences"]), float(rate["step_seconds"])) for rate in answer["decode"])
    return Rates(float(answer["prefill_tokens_per_second"]), decode)


def _compute(settings: EngineSettings) -> trial.Answer:
    """In the child."""
    from pasture.engine.open import open_unchecked

    engine = open_unchecked(replace(settings, n_cells=_CELLS, n_seqs=max(DECODE_SEQUENCES), layout=Layout.UNIFIED))
    try:
        return asdict(measure(engine))
    finally:
        engine.close()


if __name__ == "__main__":
    trial.serve(_compute)
