"""From settings to a running engine, and back to nothing when one of the steps fails.

The order: read the header (is it a model at all?), check the memory, try the settings in a child process, choose the weights,
load, make the context, and decode two tokens whose state blob tells how this model's KV is laid out. A model whose blob is of a
kind we do not know is served without sharing rather than wrongly.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from pasture.core.errors import EngineError, ModelError
from pasture.core.storage import Bytes
from pasture.core.values import ModelInfo, Weights
from pasture.engine.blob import KvFormat, StateSlab, detect_format, parse
from pasture.engine.context import Context, Piece, max_sequences
from pasture.engine.device import has_gpu
from pasture.engine.gguf_header import read_header
from pasture.engine.llama import LlamaEngine
from pasture.engine.memory import check_fits, plan_memory
from pasture.engine.model import Model, load_model
from pasture.engine.probe import probe_model
from pasture.engine.selfcheck import examine
from pasture.engine.settings import EngineSettings, OnProgress
from pasture.engine.stateblob import StateFormat, detect_state_format
from pasture.engine.weighing import choose_weights
from pasture.engine.weights import have_copy

logger = logging.getLogger(__name__)

_PROBE_TOKENS = 2


def open_engine(settings: EngineSettings, on_progress: OnProgress | None = None) -> LlamaEngine:
    """A loaded model with an empty cache. `on_progress` hears the share of the file that is read, 0 to 1.

    Raises ModelError (a file that cannot be used) or DoesNotFit (too large for the free memory), both with one clear line.
    """
    header = read_header(settings.model_path)
    info = probe_model(settings.model_path, type_k=settings.type_k, type_v=settings.type_v)
    if settings.n_gpu_layers == 0 or not has_gpu():
        settings = _within_memory(info, settings, header.number("embedding_length"))
    if not settings.self_check:
        return open_unchecked(settings, on_progress=on_progress)
    if settings.weights.is_copy:
        have_copy(settings)
    verdict = examine(settings)
    checked = verdict.apply(settings)
    chosen, because = choose_weights(checked)
    try:
        return open_unchecked(chosen, verdict.reasons, on_progress, weights_because=because)
    except ModelError as error:
        if checked.weights is not Weights.AUTO or chosen.weights is Weights.FILE:
            raise
        logger.warning("%s; its weights stay as they are in the file", error)
        return open_unchecked(replace(chosen, weights=Weights.FILE), verdict.reasons, on_progress)


def open_unchecked(
    settings: EngineSettings,
    slowed_by: tuple[str, ...] = (),
    on_progress: OnProgress | None = None,
    *,
    weights_because: str = "",
) -> LlamaEngine:
    """Load and lay out, without the checks before: the child process of the self-check does this too.

    `slowed_by`: what the checks say makes it slow here, `weights_because` what they measured; the model's info tells both.
    """
    model = load_model(settings, on_progress)
    model.info = replace(model.info, slowed_by=slowed_by, weights_because=weights_because)
    try:
        n_seqs = min(settings.n_seqs, max_sequences(model, settings.layout))
        if n_seqs < settings.n_seqs:
            logger.warning("%d sequences at once instead of %d: llama.cpp has no more ids", n_seqs, settings.n_seqs)
        context = Context(model, settings, settings.layout, n_seqs)
        try:
            learnt = _learn_format(model, context)
            if learnt is None and model.info.shareable:
                logger.warning("%s keeps its KV in a form pasture does not know: nothing is shared", model.info.name)
                context.close()
                model.info = replace(model.info, shareable=False)
                context = Context(model, settings, settings.layout, n_seqs)
            state_format = None if model.info.shareable else _learn_state_format(model, context)
        except BaseException:
            context.close()
            raise
    except BaseException:
        model.close()
        raise
    return LlamaEngine(model, context, settings, learnt, state_format)


def _within_memory(info: ModelInfo, settings: EngineSettings, n_embd: int) -> EngineSettings:
    """The settings, without an annex where the pool alone fits. Raises DoesNotFit where that does not fit either."""
    plan = plan_memory(info, settings, n_embd=n_embd)
    if settings.annex_cells and plan.needed_bytes(settings.n_cells) > plan.available_bytes:
        return _within_memory(info, replace(settings, annex_cells=0), n_embd)
    check_fits(plan, settings.n_cells)
    return settings


def _learn_format(model: Model, context: Context) -> KvFormat | None:
    """Decode two tokens and look at their blob; the true bytes a cell go into `model.info`. None: keep states whole."""
    if not model.info.shareable:
        return None
    blob = _probe_blob(model, context)
    form = detect_format(blob, _PROBE_TOKENS)
    if form is None:
        return None
    kinds = tuple(cache.kind for cache in parse(blob, form))
    model.info = replace(model.info, cell_bytes=sum(row.row_size for kind in kinds for row in kind.rows))
    return KvFormat(form, kinds)


def _learn_state_format(model: Model, context: Context) -> StateFormat | None:
    """How this model's whole states look; None: in a way that cannot be checked, so they are not stored."""
    blob = _probe_blob(model, context)
    return detect_state_format(StateSlab(0, _PROBE_TOKENS, blob, context.n_streams))


def _probe_blob(model: Model, context: Context) -> Bytes:
    """The state of a sequence of two tokens, which is gone again.

    Decoded on a thread that ends with it. OpenMP keeps the workers of every thread that ever computed; with a second such
    thread it takes the cores for oversubscribed and no longer spins between a graph's nodes. Measured on two cores: a token of
    SmolLM2 then takes 28 ms in place of 10.
    """
    token = model.vocabulary.bos or 0
    with ThreadPoolExecutor(1, "pasture-probe") as thread:
        pieces = [Piece(0, [token] * _PROBE_TOKENS, 0, wants_logits=True)]
        code, _ = thread.submit(context.decode, pieces).result()
    if code:
        raise EngineError(f"llama.cpp could not decode a first batch of {_PROBE_TOKENS} tokens (code {code})")
    blob = context.read_state(0)
    context.remove(0)
    context.clear()
    return blob


__all__ = ["EngineSettings", "ModelInfo", "open_engine", "open_unchecked", "probe_model"]
