"""Plays a workload against one endpoint: every user a task, every user waiting for their answers.

Owns the loop and the order of events; measures nothing beyond what the client notes. A request that failed ends its
user's conversation (the next question would build on an answer that never came). Runs on the caller's event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from pasture.bench.client import Chat, Endpoint, Exchange, Message, chat
from pasture.bench.recorded import Arrival
from pasture.bench.workloads import Actor, Conversation, ForkingAgent, Workload

Progress = Callable[[Exchange], None]
_Ask = Callable[[str, tuple[Message, ...], int], Awaitable[Exchange]]


@dataclass(frozen=True, slots=True)
class Target:
    """Where and how requests are sent."""

    endpoint: Endpoint
    model: str
    timeout_seconds: float


def _nobody_watches(_: Exchange) -> None:
    return None


async def play(workload: Workload, target: Target, on_exchange: Progress = _nobody_watches) -> list[Exchange]:
    """Every exchange of a complete run, in the order they ended. `on_exchange` sees each one as it ends."""
    exchanges: list[Exchange] = []

    async def ask(user: str, messages: tuple[Message, ...], max_tokens: int) -> Exchange:
        request = Chat(user, messages, max_tokens, target.model)
        exchange = await chat(target.endpoint, request, timeout_seconds=target.timeout_seconds)
        exchanges.append(exchange)
        on_exchange(exchange)
        return exchange

    async with asyncio.TaskGroup() as group:
        for actor in workload.actors:
            group.create_task(_act(actor, ask, workload.max_tokens))
    return exchanges


async def _act(actor: Actor, ask: _Ask, max_tokens: int) -> None:
    if isinstance(actor, Arrival):
        await asyncio.sleep(actor.at_seconds)
        await ask(actor.user, ({"role": "user", "content": actor.text},), actor.reply_tokens)
    elif isinstance(actor, Conversation):
        await _converse(actor, ask, max_tokens)
    else:
        await _fork(actor, ask, max_tokens)


async def _converse(actor: Conversation, ask: _Ask, max_tokens: int) -> None:
    messages: tuple[Message, ...] = ({"role": "system", "content": actor.opening},)
    for question, pause in zip(actor.questions, actor.pauses_seconds, strict=True):
        await asyncio.sleep(pause)
        messages = (*messages, {"role": "user", "content": question})
        exchange = await ask(actor.user, messages, max_tokens)
        if exchange.error is not None:
            return
        messages = (*messages, {"role": "assistant", "content": exchange.reply})


async def _fork(actor: ForkingAgent, ask: _Ask, max_tokens: int) -> None:
    context: tuple[Message, ...] = ({"role": "system", "content": actor.opening},)

    async def branch(index: int, instruction: str, delay: float) -> tuple[tuple[Message, ...], Exchange]:
        await asyncio.sleep(delay)
        messages = (*context, {"role": "user", "content": instruction})
        return messages, await ask(f"branch {index + 1}", messages, max_tokens)

    for step in actor.steps:
        await asyncio.sleep(step.pause_seconds)
        results = await asyncio.gather(
            *(
                branch(index, instruction, delay)
                for index, (instruction, delay) in enumerate(zip(step.instructions, step.delays_seconds, strict=True))
            )
        )
        messages, exchange = results[step.chosen]
        if exchange.error is not None:
            return
        context = (*messages, {"role": "assistant", "content": exchange.reply})
