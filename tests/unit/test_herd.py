"""The Python interface on the fake engine: text in, text out, everything freed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing

import pytest

import pasture
from pasture.config import Settings, setting_specs
from pasture.core.values import Constraint, ConstraintKind, FinishReason, PoolShape
from pasture.engine.fake import FakeEngine
from pasture.herd import Herd
from pasture.scheduler.service import LocalService
from tests.store_support import store_for

HELLO = [{"role": "user", "content": "Hello there"}]


def fake_service() -> LocalService:
    engine = FakeEngine(PoolShape(2048, 16))
    return LocalService(engine, store_for(engine))


@pytest.fixture
def herd() -> Iterator[Herd]:
    with Herd(fake_service()) as herd:
        yield herd


async def test_a_reply_in_pieces_is_the_reply_in_one(herd: Herd) -> None:
    pieces = [piece async for piece in herd.chat(HELLO, max_tokens=12, ignore_eos=True)]
    whole = await herd.chat_text(HELLO, max_tokens=12, ignore_eos=True)
    assert "".join(pieces) == whole.text != ""
    assert whole.reason is FinishReason.LENGTH
    assert whole.usage.completion_tokens == 12
    assert whole.usage.cached_tokens > 0, "the second time, the prompt was there already"


async def test_plain_text_is_continued_without_a_template(herd: Herd) -> None:
    pieces = [piece async for piece in herd.complete("Once upon a time", max_tokens=8, ignore_eos=True)]
    whole = await herd.complete_text("Once upon a time", max_tokens=8, ignore_eos=True)
    assert "".join(pieces) == whole.text
    assert whole.text != (await herd.chat_text([{"role": "user", "content": "Once upon a time"}], max_tokens=8)).text


async def test_many_at_once_get_what_each_would_alone(herd: Herd) -> None:
    questions = [[{"role": "user", "content": f"Question {n % 4}"}] for n in range(12)]
    together = await asyncio.gather(*(herd.chat_text(question, max_tokens=10, ignore_eos=True) for question in questions))
    alone = [await herd.chat_text(question, max_tokens=10, ignore_eos=True) for question in questions]
    assert [reply.text for reply in together] == [reply.text for reply in alone]


async def test_leaving_early_frees_what_the_reply_held(herd: Herd) -> None:
    async with aclosing(herd.chat(HELLO, ignore_eos=True)) as pieces:
        async for _ in pieces:
            break
    await herd.chat_text(HELLO, max_tokens=1)
    statistics = herd.statistics()
    assert statistics.scheduler.decoding == 0
    assert statistics.pool.running_cells == 0


async def test_a_reply_can_be_bound_to_a_form(herd: Herd) -> None:
    colour = Constraint(ConstraintKind.REGEX, "red|green")
    reply = await herd.chat_text(HELLO, constraint=colour)
    assert reply.text in ("red", "green")
    assert reply.reason is FinishReason.STOP
    with pytest.raises(pasture.RequestError, match="ignore_eos"):
        await herd.chat_text(HELLO, constraint=colour, ignore_eos=True)


async def test_stop_strings_and_namespaces(herd: Herd) -> None:
    whole = await herd.chat_text(HELLO, max_tokens=12, ignore_eos=True)
    stop = whole.text[3:5]
    cut = await herd.chat_text(HELLO, max_tokens=12, ignore_eos=True, stop=[stop])
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.reason is FinishReason.STOP
    apart = await herd.chat_text(HELLO, max_tokens=12, ignore_eos=True, namespace="other")
    assert apart.usage.cached_tokens == 0, "namespaces share nothing"
    assert apart.text == whole.text


async def test_async_with_waits_for_what_runs() -> None:
    async with Herd(fake_service()) as herd:
        pieces = herd.chat(HELLO, max_tokens=30, ignore_eos=True)
        first = await anext(pieces)
        rest = asyncio.create_task(_rest(pieces))
        await asyncio.sleep(0)
    assert len(first + await rest) >= 30


async def _rest(pieces: object) -> str:
    assert hasattr(pieces, "__aiter__")
    return "".join([piece async for piece in pieces])


def test_a_script_needs_no_event_loop(herd: Herd) -> None:
    assert herd.ask("Hello there", max_tokens=5, ignore_eos=True)
    assert herd.ask("And again", max_tokens=5, ignore_eos=True)


async def test_requests_that_cannot_be_served_say_so(herd: Herd) -> None:
    with pytest.raises(pasture.RequestError, match="at least one message"):
        await herd.chat_text([])
    with pytest.raises(pasture.PromptTooLong):
        await herd.complete_text("sheep " * 2000)


def test_open_takes_every_setting_that_is_not_the_servers() -> None:
    of_http = {"Server", "Sampling, where a request does not say", "Tenants and sessions"}
    ours = {name for name, spec in setting_specs().items() if spec.flag.group not in of_http}
    known = set(pasture.OpenOptions.__annotations__)
    assert known == ours - {"model", "fake_engine", "fake_pace"}
    assert known < set(Settings.model_fields)


def test_open_says_what_is_wrong() -> None:
    with pytest.raises(pasture.ConfigError, match=r"kv_memory: '2G' is not a size"):
        pasture.open("m.gguf", kv_memory="2G")
    with pytest.raises(pasture.ModelError, match=r"no model file at nowhere\.gguf"):
        pasture.open("nowhere.gguf")
