from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from pasture.core.errors import RateLimited
from pasture.sessions.gate import Gate
from pasture.sessions.values import Limits, Tenant
from tests.unit.sessions.conftest import Time


def tenant(**limits: float | None) -> Tenant:
    return Tenant("acme", b"salt", Limits(**limits))  # type: ignore[arg-type]


async def test_without_limits_everybody_passes_and_nothing_is_remembered() -> None:
    gate = Gate()
    async with AsyncExitStack() as stack:
        for _ in range(100):
            await stack.enter_async_context(gate.enter(tenant()))
    assert len(gate) == 0


async def test_so_many_at_once_so_many_in_line_and_no_more() -> None:
    gate, limited = Gate(), tenant(max_concurrent=2, max_queued=1)
    order: list[str] = []
    let_go = asyncio.Event()

    async def work(name: str) -> None:
        async with gate.enter(limited):
            order.append(name)
            await let_go.wait()

    tasks = [asyncio.create_task(work(name)) for name in ("a", "b", "c")]
    await asyncio.sleep(0)
    assert order == ["a", "b"]
    with pytest.raises(RateLimited):
        await work("d")
    async with gate.enter(Tenant("other", b"x")):
        pass  # somebody else's line is not longer for it
    let_go.set()
    await asyncio.gather(*tasks)
    assert order == ["a", "b", "c"]
    assert len(gate) == 0


async def test_who_gives_up_in_line_gives_the_place_back() -> None:
    gate, limited = Gate(), tenant(max_concurrent=1)

    async def work() -> None:
        async with gate.enter(limited):
            pass

    async with gate.enter(limited):
        waiting = [asyncio.create_task(work()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.sleep(0)
    waiting[1].cancel()  # it has the place already and has not yet run
    await asyncio.gather(*waiting, return_exceptions=True)
    assert not waiting[2].cancelled()
    assert len(gate) == 0


async def test_tokens_are_paid_afterwards_and_come_back_with_time(clock: Time) -> None:
    gate, limited = Gate(clock=clock), tenant(tokens_per_minute=600)
    async with gate.enter(limited) as passage:
        passage.tokens = 1200
    with pytest.raises(RateLimited) as caught:
        async with gate.enter(limited):
            pass
    assert caught.value.retry_after_seconds == pytest.approx(60)
    clock.now += 61
    async with gate.enter(limited):
        pass
    clock.now += 60
    async with gate.enter(limited):
        pass
    assert len(gate) == 0, "a full bucket is forgotten"


async def test_a_failed_request_gives_its_place_back() -> None:
    gate, limited = Gate(), tenant(max_concurrent=1)
    for _ in range(3):
        with pytest.raises(ValueError, match="broken"):
            async with gate.enter(limited):
                raise ValueError("broken")
    assert len(gate) == 0
