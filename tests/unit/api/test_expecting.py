"""The next turn before it is asked for: after a reply, and while somebody types it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import httpx
import pytest

from pasture.api import ApiSettings
from pasture.engine.fake import N_VOCAB
from tests.session_support import GREEDY, World, world
from tests.unit.api.conftest import Connect
from tests.unit.api.wire import CHAT, chat_body
from tests.unit.stub_service import StubService

HINT = "/v1/chat/prefetch"
REASONING_TOKENS, ANSWER_TOKENS = 500, 60
STRIPS_REASONING = (
    "{% for m in messages %}[{{ m.role[0] }}]"
    "{{ m.content if loop.last or m.role != 'assistant' else m.content[500:] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
"""as templates of reasoning models do: a reply loses its reasoning once another message follows; a character is a token"""
SUFFIX = "\n[a]"
QUESTION = {"role": "user", "content": "Why is the meadow green? " * 8}
FOLLOW_UP = {"role": "user", "content": "And in winter?"}
LETTERS = {str(token): -1000 for token in range(N_VOCAB) if not 97 <= token <= 122}
"""bans every other token"""


async def ask(client: httpx.AsyncClient, messages: list[dict[str, str]], max_tokens: int) -> Any:
    body = {"messages": messages, "max_tokens": max_tokens, "ignore_eos": True, "logit_bias": LETTERS}
    answer = await client.post("/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def all_done(at: World) -> None:
    """Wait until nothing is left to compute ahead. The rendering of what was answered comes first."""
    app: Any = at.transport.app
    if (rendering := app.state.gateway.expecting.under_way) is not None:
        await rendering
    while await at.service._ask(lambda scheduler: scheduler.ahead.waiting):
        pass


def computed(answer: Any) -> int:
    usage = answer["usage"]
    return int(usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"])


async def next_turn(turn_ahead: bool) -> int:
    """Prompt tokens that the turn after a long piece of reasoning computes."""
    settings = replace(GREEDY, turn_ahead=turn_ahead, chat_template=STRIPS_REASONING)
    async with world(["one"], settings=settings) as at, at.http("one") as client:
        first = await ask(client, [QUESTION], REASONING_TOKENS + ANSWER_TOKENS)
        reply = first["choices"][0]["message"]
        assert len(reply["content"]) == REASONING_TOKENS + ANSWER_TOKENS
        await all_done(at)
        return computed(await ask(client, [QUESTION, {"role": "assistant", "content": reply["content"]}, FOLLOW_UP], 4))


async def test_a_turn_after_reasoning_computes_what_its_user_said_and_next_to_nothing_else() -> None:
    assert await next_turn(turn_ahead=True) <= len(FOLLOW_UP["content"]) + 8
    assert await next_turn(turn_ahead=False) > len(FOLLOW_UP["content"]) + ANSWER_TOKENS


async def test_the_next_turn_is_rendered_when_nobody_waits_for_a_reply(connect: Connect) -> None:
    service = StubService(still=asyncio.Event())
    client = connect(service)
    for text in ("one", "two"):
        await client.post(CHAT, json=chat_body(messages=[{"role": "user", "content": text}]))
    assert service.still is not None
    for expected in (0, 2):
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(service.anticipated) == expected
        service.still.set()
    assert [bytes(t for t in tokens if t < 256).split(b"\n")[1] for tokens in service.anticipated] == [b"one", b"two"]


async def test_what_is_typed_is_computed_while_it_is_typed() -> None:
    async with world(["one"], settings=replace(GREEDY, chat_template=STRIPS_REASONING)) as at, at.http("one") as client:
        await ask(client, [QUESTION], 4)
        draft = "First of all, I should like to know how many "
        hinted = await client.post("/chat/prefetch", json={"messages": [QUESTION, FOLLOW_UP], "draft": draft})
        assert hinted.status_code == 202
        assert hinted.json()["object"] == "chat.prefetch"
        await all_done(at)
        said = draft + "sheep there are."
        answer = await ask(client, [QUESTION, FOLLOW_UP, {"role": "user", "content": said}], 4)
        assert computed(answer) == len(" sheep there are." + SUFFIX)


async def test_a_hint_is_answered_with_what_is_known_and_what_of_it_is_live(connect: Connect) -> None:
    service = StubService()
    client = connect(service)
    body = {"messages": chat_body()["messages"], "draft": "How are y"}
    answer = (await client.post(HINT, json=body)).json()
    (typed,) = service.typed
    assert bytes(t for t in typed if t < 256).endswith(b"user\nHi\nuser\nHow are")
    assert answer["tokens"] == len(typed)


@pytest.mark.parametrize(
    ("typed", "known"), [("", ""), ("Hel", ""), ("Hello ", "Hello"), ("  Hello you", "Hello"), ("Are you?", "Are you?")]
)
async def test_a_word_counts_when_it_or_its_sentence_is_complete(connect: Connect, typed: str, known: str) -> None:
    service = StubService()
    system = {"role": "system", "content": "Be kind."}
    await connect(service).post(HINT, json={"messages": [system], "draft": typed})
    assert bytes(t for t in service.typed[0] if t < 256).endswith(b"user\n" + known.encode())


async def test_without_a_draft_the_last_message_of_the_user_is_one(connect: Connect) -> None:
    one, other = StubService(), StubService()
    system = {"role": "system", "content": "Be kind."}
    await connect(one).post(HINT, json={"messages": [system, {"role": "user", "content": "How are y"}]})
    await connect(other).post(HINT, json={"messages": [system], "draft": "How are y"})
    assert one.typed == other.typed


async def test_hints_can_be_turned_off_and_are_answered_all_the_same(connect: Connect) -> None:
    service = StubService()
    answer = await connect(service, ApiSettings(prefetch=False)).post(HINT, json={"messages": chat_body()["messages"]})
    assert answer.status_code == 202
    assert not service.typed


async def test_a_template_that_refuses_the_next_message_is_a_clear_error(connect: Connect) -> None:
    template = "{{ raise_exception('no more') if messages | length > 1 else messages[0].content }}"
    client = connect(StubService(), ApiSettings(chat_template=template))
    answer = await client.post(HINT, json={"messages": chat_body()["messages"], "draft": "x "})
    assert answer.status_code == 400
    assert (await client.post(CHAT, json=chat_body())).status_code == 200
