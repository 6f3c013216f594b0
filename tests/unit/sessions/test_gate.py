from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from pasture.core.errors import RateLimited, RequestError
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


async def test_who_gave_up_is_passed_over_before_it_has_noticed() -> None:
    gate, limited = Gate(), tenant(max_concurrent=1)

    async def work() -> None:
        async with gate.enter(limited):
            pass

    async with gate.enter(limited):
        waiting = [asyncio.create_task(work()) for _ in range(2)]
        await asyncio.sleep(0)
        waiting[0].cancel()
    ended = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(error) for error in ended] == [asyncio.CancelledError, type(None)]
    assert len(gate) == 0


async def settled() -> None:
    """Everybody has gone as far as he can."""
    for _ in range(3):
        await asyncio.sleep(0)


class Line:
    """Requests of one tenant that run until they are told to end."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.running: list[int] = []
        self._ends: list[asyncio.Event] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def add(self, n: int, max_concurrent: int | None) -> None:
        for _ in range(n):
            self._ends.append(asyncio.Event())
            self._tasks.append(asyncio.create_task(self._work(len(self._tasks), max_concurrent)))
            await settled()

    async def end(self, number: int) -> None:
        self._ends[number].set()
        await self._tasks[number]
        await settled()

    async def _work(self, number: int, max_concurrent: int | None) -> None:
        async with self.gate.enter(tenant(max_concurrent=max_concurrent)):
            self.running.append(number)
            await self._ends[number].wait()
        self.running.remove(number)


async def test_a_limit_that_is_lowered_holds_for_those_who_wait_already() -> None:
    line = Line()
    await line.add(6, max_concurrent=3)
    assert line.running == [0, 1, 2]
    await line.add(1, max_concurrent=1)
    await line.end(0)
    await line.end(1)
    assert line.running == [2]
    for number in range(2, 7):
        assert line.running == [number]
        await line.end(number)
    assert len(line.gate) == 0


@pytest.mark.parametrize("raised", [3, None])
async def test_a_limit_that_is_raised_lets_those_who_wait_in_first(raised: int | None) -> None:
    line = Line()
    await line.add(3, max_concurrent=1)
    assert line.running == [0]
    await line.add(1, max_concurrent=raised)
    assert line.running == ([0, 1, 2] if raised else [0, 3, 1, 2]), "who comes waits only where there is no place left"
    for number in range(4):
        await line.end(number)
    assert line.running == []
    assert len(line.gate) == 0


async def test_a_limit_that_is_raised_holds_when_somebody_leaves() -> None:
    line = Line()
    await line.add(5, max_concurrent=1)
    with pytest.raises(RateLimited):  # told about the limit, though it does not get in itself
        async with line.gate.enter(tenant(max_concurrent=3, max_queued=0)):
            pass
    await settled()
    assert line.running == [0, 1, 2]
    await line.end(0)
    assert line.running == [1, 2, 3]
    for number in range(1, 5):
        await line.end(number)
    assert len(line.gate) == 0


async def test_tokens_are_paid_afterwards_and_come_back_with_time(clock: Time) -> None:
    gate, limited = Gate(clock=clock), tenant(tokens_per_minute=600)
    async with gate.enter(limited) as passage:
        passage.pay(1200)
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


async def test_each_reply_takes_a_place_and_those_who_need_fewer_do_not_push_in() -> None:
    gate, limited = Gate(), tenant(max_concurrent=4)
    running: list[int] = []
    ends = {replies: asyncio.Event() for replies in (1, 3, 4)}

    async def work(replies: int) -> None:
        async with gate.enter(limited, replies=replies):
            running.append(replies)
            await ends[replies].wait()
        running.remove(replies)

    tasks = {}
    for replies in (3, 4, 1):
        tasks[replies] = asyncio.create_task(work(replies))
        await settled()
    assert running == [3], "one place is free, and who came first needs four"
    ends[3].set()
    await settled()
    assert running == [4]
    ends[4].set()
    await settled()
    assert running == [1]
    ends[1].set()
    await asyncio.gather(*tasks.values())
    assert len(gate) == 0


async def test_who_waits_for_many_places_and_gives_up_lets_those_behind_it_in() -> None:
    gate, limited = Gate(), tenant(max_concurrent=3)
    entered = asyncio.Event()

    async def work(replies: int) -> None:
        async with gate.enter(limited, replies=replies):
            entered.set()

    async with gate.enter(limited, replies=2):
        waiting = [asyncio.create_task(work(replies)) for replies in (3, 1)]
        await settled()
        assert not entered.is_set()
        waiting[0].cancel()
        await asyncio.wait_for(entered.wait(), 5)
    await asyncio.gather(*waiting, return_exceptions=True)
    assert len(gate) == 0


async def test_more_replies_than_there_may_ever_be_are_an_error_and_none_where_the_limit_was_lowered_meanwhile() -> None:
    gate = Gate()
    with pytest.raises(RequestError, match="5 replies"):
        async with gate.enter(tenant(max_concurrent=4), replies=5):
            pass
    entered = asyncio.Event()

    async def work() -> None:
        async with gate.enter(tenant(max_concurrent=4), replies=4):
            entered.set()

    async with gate.enter(tenant(max_concurrent=4)):
        many = asyncio.create_task(work())
        await settled()
    async with gate.enter(tenant(max_concurrent=2, max_queued=1)):
        pass
    await asyncio.wait_for(asyncio.gather(many), 5)
    assert entered.is_set()
    assert len(gate) == 0


async def test_what_a_request_will_probably_use_is_gone_for_those_who_come_with_it(clock: Time) -> None:
    gate, limited = Gate(clock=clock), tenant(tokens_per_minute=600)

    async def come() -> None:
        async with gate.enter(limited):
            pass

    async with gate.enter(limited, tokens=400) as first:
        async with gate.enter(limited, tokens=400):
            with pytest.raises(RateLimited) as caught:
                await come()
            assert caught.value.retry_after_seconds == pytest.approx(20)
            first.pay(300)
            with pytest.raises(RateLimited):
                await come()
        await come()  # what the second one did not use is there again
        first.pay(300)  # more than was set aside
        with pytest.raises(RateLimited):
            await come()
        clock.now += 60
        await come()
    clock.now += 60
    await come()
    assert len(gate) == 0


async def test_those_who_wait_for_a_place_have_their_tokens_set_aside_too(clock: Time) -> None:
    gate, limited = Gate(clock=clock), tenant(tokens_per_minute=600, max_concurrent=1)

    async def work() -> None:
        async with gate.enter(limited, tokens=300):
            pass

    async with gate.enter(limited, tokens=300):
        second = asyncio.create_task(work())
        await settled()
        with pytest.raises(RateLimited, match="600 tokens"):
            await work()
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        third = asyncio.create_task(work())
        await settled()
    await third
    assert len(gate) == 0


async def test_tokens_come_back_from_when_they_were_paid_on(clock: Time) -> None:
    gate, limited = Gate(clock=clock), tenant(tokens_per_minute=600)
    async with gate.enter(limited) as passage:
        clock.now += 60  # with a bucket that was full all the time
        passage.pay(1200)
    clock.now += 30
    with pytest.raises(RateLimited):
        async with gate.enter(limited):
            pass


async def test_a_failed_request_gives_its_place_back() -> None:
    gate, limited = Gate(), tenant(max_concurrent=1)
    for _ in range(3):
        with pytest.raises(ValueError, match="broken"):
            async with gate.enter(limited):
                raise ValueError("broken")
    assert len(gate) == 0
