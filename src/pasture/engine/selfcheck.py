"""Trying the settings where a crash does no harm: in a child process, before the model is loaded for good.

Some machines announce instructions they fault on (AMX in some virtual machines kills the process at the first prefill of a
Q4 model in repacked buffers). So a child loads the model with the chosen settings, prefills 64 tokens and decodes a few. If
a signal ends it, the next safer settings are tried: without repacked buffers, then without the GPU. The child that lives also
looks whether its build of llama.cpp is slow at this model (`engine.heads`). What was turned off, what is slow, and why, goes
to the log. Two more children, where that makes sense, find out with which weights the model is quicker (`engine.weights`,
`engine.rates`). The verdict is kept for this machine, build, file and settings, so later starts skip the children; but only
where all deaths were of a kind that this processor dies again, and the GPU is on as asked: a GPU may have been busy, or its
driver ill.

`python -m pasture.engine.selfcheck` is the child: settings as JSON on stdin, one JSON line on stdout. The parent holds no C
state of its own. A child that takes too long proves nothing: repacked buffers stay off, the log says so, and the next start
asks again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pasture.core.errors import ModelError, PastureError
from pasture.core.values import Layout, Weights
from pasture.engine.device import has_gpu
from pasture.engine.memory import available_bytes
from pasture.engine.rates import DECODE_SEQUENCES, DecodeRate, Rates, measure
from pasture.engine.settings import EngineSettings, default_threads
from pasture.engine.weights import cache_directory, worth_trying

logger = logging.getLogger(__name__)

_PREFILL_TOKENS = 64
_DECODE_TOKENS = 3
_BASE_TIMEOUT_SECONDS = 60.0
_SLOWEST_BYTES_PER_SECOND = 50e6
_HEAD_BYTES = 1 << 20
_LASTING = {getattr(signal, name, None) for name in ("SIGILL", "SIGSEGV", "SIGBUS")} - {None}
"""what ends a child whose processor does not carry out what it announces; an abort or a kill may have had a passing reason"""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What survived and was quickest: the settings a self-check may change, and why it did."""

    use_extra_bufts: bool
    n_gpu_layers: int
    weights: Weights = Weights.FILE
    reasons: tuple[str, ...] = ()
    """what was turned off and why, and what else makes the model slow here"""
    weights_because: str = ""
    """what was measured, where the weights were chosen"""

    def apply(self, settings: EngineSettings) -> EngineSettings:
        return replace(settings, use_extra_bufts=self.use_extra_bufts, n_gpu_layers=self.n_gpu_layers, weights=self.weights)


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
            verdict = Verdict(False, settings.n_gpu_layers, _unmeasured(settings), (too_slow,))
        else:
            if lasting and verdict.n_gpu_layers == settings.n_gpu_layers:
                _remember(cache, verdict)
    for reason in verdict.reasons:
        logger.warning("%s", reason)
    return verdict


def _candidates(settings: EngineSettings) -> Iterator[tuple[str, EngineSettings]]:
    """(what this turns off, settings), safer and safer."""
    asked = replace(settings, use_extra_bufts=settings.use_extra_bufts is not False, weights=_unmeasured(settings))
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
        trial = _run_child(candidate)
        if not trial.death:
            reasons += filter(None, [trial.slow])
            weights, because = _choose_weights(settings, candidate)
            verdict = Verdict(bool(candidate.use_extra_bufts), candidate.n_gpu_layers, weights, tuple(reasons), because)
            return verdict, lasting
        death, lasting = trial.death, lasting and trial.lasting
    raise ModelError(f"{settings.model_path} cannot run on this machine: even with the safest settings, {death}")


def _unmeasured(settings: EngineSettings) -> Weights:
    return Weights.FILE if settings.weights is Weights.AUTO else settings.weights


def _choose_weights(settings: EngineSettings, survivor: EngineSettings) -> tuple[Weights, str]:
    """With which weights the surviving settings are quicker, and by how much; as asked where somebody chose."""
    mapped = settings.use_mmap and not settings.use_mlock
    on_gpu = bool(survivor.n_gpu_layers) and has_gpu()
    if settings.weights is not Weights.AUTO or on_gpu or not mapped:
        return survivor.weights, ""
    if not worth_trying(settings.model_path, available_bytes()):
        return Weights.FILE, ""
    try:
        packed, unpacked = _rates(survivor), _rates(replace(survivor, weights=Weights.F16))
    except (ModelError, subprocess.TimeoutExpired) as error:
        logger.info("the weights stay as they are in the file: %s", error)
        return Weights.FILE, ""
    if packed is None or unpacked is None:
        return Weights.FILE, ""
    return (Weights.F16 if unpacked.is_better_than(packed) else Weights.FILE), unpacked.beside(packed)


def _rates(settings: EngineSettings) -> Rates | None:
    """How quick a child is with these settings; None when it dies of them."""
    answer = _answer_of(_start(settings, "measure"))
    if isinstance(answer, Trial):
        return None
    decode = tuple(DecodeRate(int(rate["sequences"]), float(rate["step_seconds"])) for rate in answer["decode"])
    return Rates(float(answer["prefill_tokens_per_second"]), decode)


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
    answer = _answer_of(_start(settings, "trial"))
    return answer if isinstance(answer, Trial) else Trial(slow=str(answer.get("slow", "")))


def _start(settings: EngineSettings, task: str) -> subprocess.CompletedProcess[str]:
    """Run the child to its end. Raises TimeoutExpired, with the child gone, when no answer comes."""
    size = os.path.getsize(settings.model_path)
    command = [sys.executable, "-m", "pasture.engine.selfcheck", task]
    return subprocess.run(
        command,
        input=json.dumps(asdict(settings)),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_BASE_TIMEOUT_SECONDS + size / _SLOWEST_BYTES_PER_SECOND,
        check=False,
    )


def _answer_of(child: subprocess.CompletedProcess[str]) -> Trial | dict[str, Any]:
    """What a child said, or how it died. Raises ModelError when the model itself cannot be loaded."""
    if child.returncode < 0:
        number = -child.returncode
        return Trial(f"a trial run was killed by {_signal_name(number)}", lasting=number in _LASTING)
    try:
        answer: dict[str, Any] = json.loads(child.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return Trial(f"a trial run ended with status {child.returncode}")
    if "error" in answer:
        raise ModelError(str(answer["error"]))
    return answer


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# The verdict's cache: one JSON file of key -> verdict


def _cache_file(settings: EngineSettings) -> Path:
    """One file a question: equal machine, library, model file and settings ask the same one."""
    from pasture.engine.bindings import BUILD

    path = Path(settings.model_path)
    stat = path.stat()
    with path.open("rb") as file:
        head = hashlib.sha256(file.read(_HEAD_BYTES)).hexdigest()
    question = (
        *(stat.st_size, stat.st_mtime_ns, head, _cpu_model(), BUILD, settings.use_extra_bufts, settings.n_gpu_layers),
        *(settings.flash_attn, settings.type_k, settings.type_v, settings.n_ubatch, settings.main_gpu, settings.weights),
        *(settings.n_threads, settings.n_threads_batch, default_threads(), settings.use_mmap, settings.use_mlock),
    )
    name = hashlib.sha256(repr(question).encode()).hexdigest()[:32]
    return cache_directory() / "selfcheck" / f"{name}.json"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _recall(path: Path) -> Verdict | None:
    """The kept verdict; None when there is none or the file is damaged."""
    try:
        kept = json.loads(path.read_text())
        extra, layers, reasons = kept["use_extra_bufts"], kept["n_gpu_layers"], kept["reasons"]
        weights, because = Weights(kept["weights"]), str(kept["weights_because"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not (isinstance(extra, bool) and isinstance(layers, int) and isinstance(reasons, list)):
        return None
    return Verdict(extra, layers, weights, tuple(map(str, reasons)), because)


def _remember(path: Path, verdict: Verdict) -> None:
    """Best effort: a cache that cannot be written costs the next start a second."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(asdict(verdict), file)
        os.replace(file.name, path)
    except OSError as error:
        logger.info("the self-check's verdict cannot be kept in %s: %s", path, error)


# The child


def _child(task: str) -> Mapping[str, object]:
    asked = json.loads(sys.stdin.read())
    enums = {"layout": Layout(asked["layout"]), "weights": Weights(asked["weights"])}
    settings = EngineSettings(**(asked | enums | {"tensor_split": tuple(asked["tensor_split"])}))
    settings = replace(settings, n_batch=256, use_mmap=True, use_mlock=False)
    try:
        return _measure(settings) if task == "measure" else _try(settings)
    except PastureError as error:
        return {"error": str(error)}


def _measure(settings: EngineSettings) -> Mapping[str, object]:
    from pasture.engine.open import open_unchecked

    engine = open_unchecked(replace(settings, n_cells=1024, n_seqs=max(DECODE_SEQUENCES), layout=Layout.UNIFIED))
    try:
        return asdict(measure(engine))
    finally:
        engine.close()


def _try(settings: EngineSettings) -> Mapping[str, object]:
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
    return {"ok": True, "slow": "" if settings.n_gpu_layers else slow_heads(head_elements(settings.model_path))}


if __name__ == "__main__":
    print(json.dumps(_child(sys.argv[1])))
