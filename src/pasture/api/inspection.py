"""The routes that look: models, tokens, templates, health, metrics, `/props` and `/slots`. None of them generates."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial

import orjson
from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import Response

from pasture.api.answers import Content, Health, ModelBody, ModelList, Props, RenderedPrompt, SlotList, Tokens
from pasture.api.bodies import read_body
from pasture.api.callers import ADMIN, tenant_of
from pasture.api.formats import FINGERPRINT, Json
from pasture.api.gateway import Gateway
from pasture.api.offload import off_loop, size_of
from pasture.api.openapi import described
from pasture.api.schemas import DetokenizeBody, TemplateBody, TokenizeBody
from pasture.core.statistics import SequenceState, SequenceStatistics
from pasture.core.storage import StoreStatistics
from pasture.core.values import PUBLIC_NAMESPACE, SamplingParams


def inspection_routes(gateway: Gateway) -> APIRouter:
    """Routes over the gateway's service."""
    router = APIRouter()
    started = int(time.time())

    @router.get("/v1/models", **described("Inspection", "The model served", ModelList))
    async def models() -> Response:
        return _json({"object": "list", "data": [_model(gateway, started)]})

    @router.get("/v1/models/{model:path}", **described("Inspection", "The model served, by its name", ModelBody, errors=(404,)))
    async def model(model: str) -> Response:
        if model != gateway.model_name:
            raise HTTPException(404, f"the model {model[:100]!r} does not exist here; {gateway.model_name!r} does")
        return _json(_model(gateway, started))

    @router.get(
        "/props",
        **described("Inspection", "The model, the pool, the tiers, the default sampling parameters, the chat template", Props),
    )
    async def props(request: Request) -> Response:
        shown = _props(gateway)
        if gateway.settings.admin_key is None or ADMIN in request.scope:
            shown["store"] = _store(gateway.service.statistics().store)
        return _json(shown)

    @router.get(
        "/slots", **described("Operator", "Sequences in the live cache: all for the admin key, else one's own", SlotList)
    )
    async def slots(request: Request) -> Response:
        statistics = gateway.service.statistics()
        longest = gateway.service.max_conversation_tokens
        shown = statistics.pool.sequences
        if gateway.settings.admin_key is None:
            own = tenant_of(request.scope, gateway.state).namespace(gateway.state.share)
            shown = tuple(sequence for sequence in shown if sequence.namespace in (own, PUBLIC_NAMESPACE))
        return _json([_slot(sequence, longest) for sequence in shown])

    @router.get("/metrics", **described("Operator", "Prometheus' metrics", media="text/plain"))
    async def metrics() -> Response:
        return Response(gateway.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router


def text_routes(gateway: Gateway) -> APIRouter:
    """Text to tokens and back, and the chat template by itself, as llama-server spells them."""
    router = APIRouter()
    limit = gateway.settings.max_body_bytes

    @router.post("/tokenize", **described("Text", "Text to tokens", Tokens, body=TokenizeBody))
    async def tokenize(request: Request) -> Response:
        body = await read_body(request, TokenizeBody, limit)
        vocabulary = gateway.service.vocabulary

        def tokenised() -> Response:
            tokens = vocabulary.tokenize(body.content, add_special=body.add_special, parse_special=body.parse_special)
            if not body.with_pieces:
                return _json({"tokens": tokens})
            return _json(
                {"tokens": [{"id": token, "piece": _piece(vocabulary.piece(token, special=True))} for token in tokens]}
            )

        return await off_loop(len(body.content), tokenised)

    @router.post("/detokenize", **described("Text", "Tokens to text", Content, body=DetokenizeBody))
    async def detokenize(request: Request) -> Response:
        body = await read_body(request, DetokenizeBody, limit)
        return _json({"content": await off_loop(len(body.tokens), partial(gateway.prompts.detokenize, body.tokens))})

    @router.post(
        "/apply-template", **described("Text", "What the chat template makes of messages", RenderedPrompt, body=TemplateBody)
    )
    async def apply_template(request: Request) -> Response:
        body = await read_body(request, TemplateBody, limit)
        return _json({"prompt": await off_loop(size_of(body.messages, body.tools), partial(gateway.jobs.render, body))})

    return router


def health_routes(gateway: Gateway) -> APIRouter:
    """Liveness (the process answers, and what computes has not ended) and readiness (it takes requests)."""
    router = APIRouter()

    @router.head("/health/live", include_in_schema=False)
    @router.get("/health/live", **described("Inspection", "Whether a restart is not needed", Health, errors=(503,)))
    async def live() -> Response:
        if not gateway.service.alive:
            raise HTTPException(503, "the engine has ended; the server must be started again")
        return _json({"status": "ok"})

    @router.head("/health", include_in_schema=False)
    @router.head("/health/ready", include_in_schema=False)
    @router.get("/health", **described("Inspection", "Whether requests are taken", Health, errors=(503,)))
    @router.get("/health/ready", **described("Inspection", "Whether requests are taken", Health, errors=(503,)))
    async def ready() -> Response:
        if not gateway.service.ready:
            raise HTTPException(503, "the server is loading its model or shutting down", headers={"retry-after": "1"})
        return _json({"status": "ok"})

    return router


def _json(value: object) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


def _piece(piece: bytes) -> str | list[int]:
    """Text where the token is whole characters, else its bytes, as llama-server answers."""
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return list(piece)


def _model(gateway: Gateway, created: int) -> Json:
    info = gateway.service.model
    meta = {
        "n_vocab": info.n_vocab,
        "n_ctx_train": info.n_ctx_train,
        "n_ctx": gateway.service.max_conversation_tokens,
        "n_params": info.n_params,
        "size": info.n_bytes,
        "architecture": info.architecture,
    }
    return {"id": gateway.model_name, "object": "model", "created": created, "owned_by": "pasture", "meta": meta}


def _props(gateway: Gateway) -> Json:
    service = gateway.service
    statistics = service.statistics()
    shape = statistics.pool.shape
    template = gateway.prompts.template
    return {
        "model_alias": gateway.model_name,
        "model_path": service.model.path,
        "model": asdict(service.model),
        "total_slots": shape.n_seqs,
        "default_generation_settings": {
            "n_ctx": service.max_conversation_tokens,
            "params": _sampling(gateway.settings.sampling),
        },
        "kv": {
            "cells": shape.n_cells,
            "layout": shape.layout.value,
            "cell_bytes": service.model.cell_bytes,
            "form": shape.form.value,
            "bytes": statistics.live_bytes,
            "annex_cells": shape.annex_cells,
            "annex_bytes": statistics.annex_bytes,
        },
        "turn_ahead": gateway.settings.turn_ahead,
        "modalities": {"vision": False, "audio": False},
        "chat_template": template.source,
        "bos_token": template.bos,
        "eos_token": template.eos,
        "build_info": FINGERPRINT,
    }


def _store(store: StoreStatistics) -> Json:
    return {
        "tiers": [
            asdict(tier) | {"bytes_by_form": {form.value: size for form, size in tier.bytes_by_form.items()}}
            for tier in store.tiers
        ],
        "gate": {
            "prefill_tokens_per_second": store.prefill_tokens_per_second,
            "save_bytes_per_second": store.save_bytes_per_second,
            "restore_bytes_per_second": store.restore_bytes_per_second,
            "refusals": dict(store.gate_refusals),
        },
    }


def _sampling(params: SamplingParams) -> Json:
    told = {**asdict(params), "logit_bias": [[token, bias] for token, bias in params.logit_bias.items()]}
    del told["constraint"]  # a request's own
    return told


def _slot(sequence: SequenceStatistics, longest: int) -> Json:
    return {
        "id": sequence.sequence,
        "id_task": sequence.request_id,
        "n_ctx": longest,
        "is_processing": sequence.state is not SequenceState.IDLE,
        "state": sequence.state.value,
        "n_tokens": sequence.n_tokens,
        "n_shared_tokens": sequence.shared_tokens,
        "idle_seconds": sequence.idle_seconds,
    }
