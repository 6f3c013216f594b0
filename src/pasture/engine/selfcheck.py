"""Trying the settings where a crash does no harm: in a child process, before the model is loaded for good.

Some machines announce instructions they fault on (AMX in some virtual machines kills the process at the first prefill of a
Q4 model in repacked buffers). So a child loads the model with the chosen settings, prefills 64 tokens and decodes a few. If
a signal ends it, the next safer settings are tried: without repacked buffers, then without the GPU. The child that lives also
looks whether its build of llama.cpp is slow at this model (`engine.heads`). What was turned off, what is slow, and why, goes
to the log. The verdict is kept for this machine, build, file and settings, so later starts skip the child; but only where all
deaths were of a kind that this processor dies again, and the GPU is on as asked: a GPU may have been busy, or its driver ill.

A child (`engine.trial`) that takes too long proves nothing: repacked buffers stay off, the log says so, and the next start
asks again.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pasture.core.errors import ModelError
from pasture.engine import trial, usercache
from pasture.engine.settings import EngineSettings

logger = logging.getLogger(__name__)

_PREFILL_TOKENS = 64
_DECODE_TOKENS = 3


@dataclass(frozen=True, slots=True)
class Verdict:
    """What survived: the two settings a self-check may change, why it did, and what else makes the model slow here."""

    use_extra_bufts: bool
    n_gpu_layers: int
    reasons: tuple[str, ...] = ()

    def apply(self, settings: EngineSettings) -> EngineSettings:
        return replace(settings, use_extra_bufts=self.use_extra_bufts, n_gpu_layers=self.n_gpu_layers)


def find_safe_settings(settings: EngineSettings) -> EngineSettings:
    """The settings, or the nearest safer ones that this machine survives. Raises ModelError when none do."""
    return examine(settings).apply(settings)


def examine(settings: EngineSettings) -> Verdict:
    """What of the settings this machine survives. Raises ModelError when nothing does."""
    cache = _cache_file(settings)
    verdict = _recall(cache)
    if verdict is None or verdict.n_gpu_layers != settings.n_gpu_layers:
        try:
            verdict, lasting = _try_candidates(settings)
        except subprocess.TimeoutExpired as error:
            too_slow = f"self-check: no answer in {error.timeout:.0f} s; repacked weight buffers turned off to be safe"
            verdict = Verdict(False, settings.n_gpu_layers, (too_slow,))
        else:
            if lasting and verdict.n_gpu_layers == settings.n_gpu_layers:
                usercache.remember(cache, asdict(verdict))
    for reason in verdict.reasons:
        logger.warning("%s", reason)
    return verdict


def _candidates(settings: EngineSettings) -> Iterator[tuple[str, EngineSettings]]:
    """(what this turns off, settings), safer and safer."""
    asked = replace(settings, use_extra_bufts=settings.use_extra_bufts is not False)
    yield "", asked
    if asked.use_extra_bufts:
        asked = replace(asked, use_extra_bufts=False)
        yield "repacked weight buffers (use_extra_bufts)", asked
    if asked.n_gpu_layers:
        yield "the GPU (n_gpu_layers)", replace(asked, n_gpu_layers=0)


def _try_candidates(settings: EngineSettings) -> tuple[Verdict, bool]:
    """What survived, and whether the next start would find the same."""
    reasons: list[str] = []
    death, lasting = "", True
    for turned_off, candidate in _candidates(settings):
        if turned_off:
            reasons.append(f"self-check: {death}; {turned_off} turned off")
        ended = _run_child(candidate)
        if not ended.death:
            reasons += filter(None, [ended.slow])
            return Verdict(bool(candidate.use_extra_bufts), candidate.n_gpu_layers, tuple(reasons)), lasting
        death, lasting = ended.death, lasting and ended.lasting
    raise ModelError(f"{settings.model_path} cannot run on this machine: even with the safest settings, {death}")


@dataclass(frozen=True, slots=True)
class Trial:
    """A child's end: how it died, empty when it lived; then what it found slow, if anything."""

    death: str = ""
    slow: str = ""
    lasting: bool = False
    """whether it would die so again"""


def _run_child(settings: EngineSettings) -> Trial:
    """Load and compute in a child.

    Raises ModelError when the model itself cannot be loaded, TimeoutExpired (with the child gone) when no answer comes.
    """
    answer = trial.run("pasture.engine.selfcheck", settings, trial.file_bytes(settings))
    if isinstance(answer, trial.Death):
        return Trial(answer.reason, lasting=answer.lasting)
    return Trial(slow=str(answer.get("slow", "")))


def _cache_file(settings: EngineSettings) -> Path:
    """One file a question: equal machine, library, model file and settings ask the same one."""
    from pasture.engine.bindings import BUILD

    mark = usercache.model_mark(Path(settings.model_path))
    question = (
        *(*mark, usercache.processor(), BUILD, settings.use_extra_bufts, settings.n_gpu_layers, settings.weights),
        *(settings.flash_attn, settings.type_k, settings.type_v, settings.n_ubatch, settings.main_gpu),
    )
    return usercache.answer_file("selfcheck", question)


def _recall(path: Path) -> Verdict | None:
    """The kept verdict; None when there is none or the file is damaged."""
    kept = usercache.recall(path)
    extra, layers, reasons = (kept.get(name) for name in ("use_extra_bufts", "n_gpu_layers", "reasons"))
    if not (isinstance(extra, bool) and isinstance(layers, int) and isinstance(reasons, list)):
        return None
    return Verdict(extra, layers, tuple(map(str, reasons)))


# The child


def _compute(settings: EngineSettings) -> trial.Answer:
    from pasture.core.values import SamplingParams, SeqId, StepPlan, Work
    from pasture.engine.heads import slow_heads
    from pasture.engine.open import open_unchecked
    from pasture.engine.probe import head_elements

    engine = open_unchecked(replace(settings, n_cells=512, n_seqs=2))
    sampler = engine.sampler(SamplingParams(temperature=0), [])
    tokens, start = [1] * _PREFILL_TOKENS, 0
    for _ in range(1 + _DECODE_TOKENS):
        result = engine.execute(StepPlan((), (Work(SeqId(0), tokens, start, sampler),)))
        start += len(tokens)
        tokens = [result.samples[SeqId(0)].token]
    engine.close()
    return {"slow": "" if settings.n_gpu_layers else slow_heads(head_elements(settings.model_path))}


if __name__ == "__main__":
    trial.serve(_compute)
