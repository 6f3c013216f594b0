"""HTTP, scheduler, pool and the engine without a model, together: the text is that of a lone run, and nothing stays behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from pasture.api import ApiSettings, create_app
from pasture.api.server import DrainingServer, ServerOptions, bind
from pasture.core.values import Layout, PoolShape
from pasture.engine.fake import FakeEngine
from pasture.scheduler.service import LocalService
from tests.store_support import store_for
from tests.unit.api.wire import CHAT, chat_texts

SYSTEM = "You are a shepherd. " * 20


def body(question: str, **fields: object) -> dict[str, object]:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    return {"messages": messages, "temperature": 0, "max_tokens": 24, "ignore_eos": True, **fields}


@pytest.fixture
async def service() -> AsyncIterator[LocalService]:
    engine = FakeEngine(PoolShape(8192, 32, Layout.UNIFIED))
    made = LocalService(engine, store_for(engine))
    yield made
    await asyncio.to_thread(made.close)


@pytest.fixture
async def client(service: LocalService) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server on a real socket: a client that leaves must be seen to leave."""
    started: asyncio.Queue[str] = asyncio.Queue()
    server = DrainingServer(create_app(service), ServerOptions(), started.put_nowait)
    task = asyncio.create_task(server.serve([bind("127.0.0.1", 0)]))
    async with httpx.AsyncClient(base_url=await started.get(), timeout=60) as made:
        yield made
    server.stop()
    await task


async def idle(service: LocalService) -> None:
    """Until the books show that nothing runs, waits or is held; they are drawn anew whenever the engine rests."""
    while True:
        now = service.statistics()
        scheduler = now.scheduler
        ended = sum(scheduler.finished_total.values())
        if ended and ended == scheduler.submitted_total and not now.pool.running_cells:
            return
        await asyncio.sleep(0.001)


async def test_whole_and_streamed_alone_and_together_the_text_is_the_same(client: httpx.AsyncClient) -> None:
    questions = [f"Question {i}?" for i in range(8)]
    alone = [(await client.post(CHAT, json=body(question))).json() for question in questions]
    texts = [answer["choices"][0]["message"]["content"] for answer in alone]
    assert len(set(texts)) > 1
    together = await asyncio.gather(*[client.post(CHAT, json=body(question, stream=True)) for question in questions])
    assert [chat_texts(answer.text)[0] for answer in together] == texts
    again = await client.post(CHAT, json=body(questions[0]))
    usage = again.json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1


FORGETFUL = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content[-60:] if m.role == 'assistant' else m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""shows only the end of a reply once it is history, as templates do that strip reasoning"""


async def test_a_reply_that_is_shown_differently_later_is_computed_before_the_next_turn(service: LocalService) -> None:
    app = create_app(service, ApiSettings(chat_template=FORGETFUL))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(base_url="http://pasture", transport=transport) as client:
        turn = body("What is a flock?", max_tokens=500)
        reply = (await client.post(CHAT, json=turn)).json()["choices"][0]["message"]["content"]
        for _ in range(5000):
            if service.statistics().scheduler.ahead_tokens_total:
                break
            await asyncio.sleep(0.001)
        said = [*turn["messages"], {"role": "assistant", "content": reply}, {"role": "user", "content": "And a herd?"}]  # type: ignore[misc]
        usage = (await client.post(CHAT, json={**turn, "messages": said, "max_tokens": 4})).json()["usage"]
    new_text = len("<|user|>And a herd?\n<|assistant|>")
    assert usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"] <= new_text + 8


async def test_a_stop_string_reports_what_was_cached(client: httpx.AsyncClient) -> None:
    whole = (await client.post(CHAT, json=body("Why?"))).json()["choices"][0]["message"]["content"]
    stopped = (await client.post(CHAT, json=body("Why?", stop=[whole[5:8]]))).json()
    assert stopped["choices"][0]["message"]["content"] == whole[: whole.index(whole[5:8])]
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert stopped["usage"]["prompt_tokens_details"]["cached_tokens"] == stopped["usage"]["prompt_tokens"] - 1


async def test_choices_of_one_call_compute_their_prompt_once(client: httpx.AsyncClient, service: LocalService) -> None:
    answer = (await client.post(CHAT, json=body("Many?", n=6, temperature=2.0, seed=1))).json()
    assert len({choice["message"]["content"] for choice in answer["choices"]}) > 1
    await idle(service)
    computed = service.statistics().scheduler.computed_tokens_total
    assert answer["usage"]["prompt_tokens"] <= computed < answer["usage"]["prompt_tokens"] * 1.1


async def test_clients_that_vanish_leave_nothing_behind(client: httpx.AsyncClient, service: LocalService) -> None:
    async def ask_and_leave(i: int) -> None:
        asked = body(f"Question {i}?", stream=bool(i % 2), n=1 + i % 3, max_tokens=5000)
        try:
            async with asyncio.timeout(0.02 * (i % 5)), client.stream("POST", CHAT, json=asked) as response:
                async for _ in response.aiter_lines():
                    pass
        except TimeoutError:
            pass

    async def leave_in_the_middle() -> None:
        asked = body("Questions?", stream=True, max_tokens=5000)
        async with client.stream("POST", CHAT, json=asked) as response:
            async for _ in response.aiter_lines():
                return

    await asyncio.gather(leave_in_the_middle(), *[ask_and_leave(i) for i in range(60)])
    assert (await client.post(CHAT, json=body("Still there?"))).status_code == 200
    await idle(service)
    scheduler = service.statistics().scheduler
    assert (scheduler.waiting, scheduler.prefilling, scheduler.decoding, scheduler.swapped) == (0, 0, 0, 0)
    assert scheduler.invariant_failures_total == 0
    assert scheduler.finished_total["cancelled"] > 0
