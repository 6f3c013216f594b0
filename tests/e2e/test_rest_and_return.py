"""What left the live cache comes back as it was: through RAM, through a restart, and at checkpoints of running states."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import pytest

from pasture.core.statistics import Verification
from pasture.core.values import Request, RequestId, SamplingParams, TokenLogprobs, Usage
from pasture.scheduler.samples import SAMPLE_TOKENS
from pasture.scheduler.service import LocalService
from pasture.scheduler.settings import SchedulerSettings
from pasture.tiers.disk import DiskTier
from tests.engine_support import open_small
from tests.gguf_factory import write_falcon_h1, write_gemma3, write_llama, write_mamba
from tests.store_support import store_for

Writer = Callable[[Path], Path]
SYSTEM = [5 + i * 7 % 200 for i in range(150)]
N_REPLY = 6
GREEDY = SamplingParams(temperature=0.0)
TIE_NATS = 0.01
_serial = count()


def serve(
    path: Path,
    cache: Path | None = None,
    *,
    idle_live_seconds: float | None = None,
    n_cells: int = 1024,
    ram_bytes: int = 1 << 30,
) -> LocalService:
    engine = open_small(path, n_cells=n_cells, n_batch=64)
    slow = [DiskTier(cache, 1 << 30)] if cache is not None else []
    settings = SchedulerSettings(check_invariants=True, idle_live_seconds=idle_live_seconds)
    return LocalService(engine, store_for(engine, ram_bytes, slow), settings)


async def ask(service: LocalService, prompt: Sequence[int], max_tokens: int = N_REPLY) -> tuple[list[int], Usage]:
    request = Request(RequestId(f"r{next(_serial)}"), tuple(prompt), max_tokens, GREEDY)
    reply: list[int] = []
    async for event in service.generate(request):
        if event.token is not None:
            reply.append(event.token)
        if event.finish is not None:
            assert event.finish.error is None
            return reply, event.finish.usage
    raise AssertionError("a stream without an end")


async def draw(service: LocalService, prompt: Sequence[int], max_tokens: int) -> list[tuple[int, TokenLogprobs]]:
    """A greedy reply with its log probabilities."""
    request = Request(RequestId(f"r{next(_serial)}"), tuple(prompt), max_tokens, GREEDY, n_logprobs=5)
    events = [event async for event in service.generate(request)]
    return [(event.token, event.logprobs) for event in events if event.token is not None and event.logprobs is not None]


def assert_same_but_for_ties(one: list[tuple[int, TokenLogprobs]], other: list[tuple[int, TokenLogprobs]]) -> None:
    """Which rows a step computes together depends on time and moves the last digits: at a tie either token may come."""
    for (mine, seen), (theirs, _) in zip(one, other, strict=True):
        if mine != theirs:
            assert seen.logprob - dict(seen.top)[theirs] < TIE_NATS
            return


async def cold(path: Path, prompt: Sequence[int]) -> list[int]:
    """The answer of a server that has seen nothing."""
    service = serve(path)
    reply, usage = await ask(service, prompt)
    assert usage.cached_tokens == 0
    service.close()
    return reply


@pytest.mark.parametrize("write", [write_llama, write_gemma3, write_mamba, write_falcon_h1])
async def test_a_conversation_that_left_the_live_cache_goes_on(tmp_path: Path, write: Writer) -> None:
    path = write(tmp_path / "tiny.gguf")
    service = serve(path, idle_live_seconds=0.0)  # idle sequences leave in the next step
    first, _ = await ask(service, SYSTEM)
    await ask(service, [9, 9, 9])
    turn = [*SYSTEM, *first, 11, 12, 13]
    assert service.statistics().pool.evicted_cells["idle"] >= len(SYSTEM)
    reply, usage = await ask(service, turn)
    assert usage.cached_tokens == len(SYSTEM) + len(first) - 1
    assert service.statistics().pool.hit_tokens["stored"] == usage.cached_tokens
    service.close()
    assert reply == await cold(path, turn)


@pytest.mark.parametrize("write", [write_llama, write_gemma3, write_mamba, write_falcon_h1])
async def test_a_restarted_server_goes_on_where_the_first_one_ended(tmp_path: Path, write: Writer) -> None:
    path, cache = write(tmp_path / "tiny.gguf"), tmp_path / "cache"
    service = serve(path, cache)
    first, _ = await ask(service, SYSTEM)
    service.close()
    turn = [*SYSTEM, *first, 11, 12, 13]
    again = serve(path, cache)
    reply, usage = await ask(again, turn)
    verified = await again.verify()
    cuttable = again.model.shareable
    again.close()
    assert usage.cached_tokens == len(SYSTEM) + len(first) - 1
    assert reply == await cold(path, turn)
    assert verified == Verification(SAMPLE_TOKENS if cuttable else 0, 0)


async def test_a_prompt_that_ends_inside_a_block_on_disk_recomputes_one_token(tmp_path: Path) -> None:
    path, cache = write_llama(tmp_path / "tiny.gguf"), tmp_path / "cache"
    service = serve(path, cache)
    await ask(service, SYSTEM, max_tokens=60)  # goes on beyond the block in which SYSTEM ends
    service.close()
    again = serve(path, cache)
    reply, usage = await ask(again, SYSTEM)
    again.close()
    assert usage.cached_tokens == len(SYSTEM) - 1
    assert reply == await cold(path, SYSTEM)


@pytest.mark.parametrize("write", [write_mamba, write_falcon_h1])
async def test_a_running_state_is_kept_where_two_prompts_part(tmp_path: Path, write: Writer) -> None:
    path = write(tmp_path / "tiny.gguf")
    service = serve(path)
    prompts = [[*SYSTEM, *[100 + i] * 20] for i in range(3)]
    cached = [(await ask(service, prompt))[1].cached_tokens for prompt in prompts[:2]]
    reply, usage = await ask(service, prompts[2])
    service.close()
    assert cached == [0, 0]
    assert usage.cached_tokens == 128  # whole blocks of the 150 tokens that they have in common
    assert reply == await cold(path, prompts[2])


@pytest.mark.parametrize("ram_bytes", [0, 1 << 30], ids=["without a RAM tier", "with one"])
async def test_a_pool_that_is_too_small_swaps_and_computes_nothing_twice(tmp_path: Path, ram_bytes: int) -> None:
    path = write_llama(tmp_path / "tiny.gguf")
    service = serve(path, n_cells=512, ram_bytes=ram_bytes)
    prompts = [[30 + i, *SYSTEM[:120]] for i in range(4)]
    replies = await asyncio.gather(*(draw(service, prompt, 60) for prompt in prompts))
    statistics = service.statistics()
    service.close()
    assert statistics.scheduler.swaps_total > 0
    assert statistics.scheduler.computed_tokens_total == sum(map(len, prompts))
    for prompt, reply in zip(prompts, replies, strict=True):
        alone = serve(path)
        assert_same_but_for_ties(await draw(alone, prompt, 60), reply)
        alone.close()
