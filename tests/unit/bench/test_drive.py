from __future__ import annotations

from pasture.bench.client import Exchange
from pasture.bench.drive import Target, play
from pasture.bench.options import BenchOptions, WorkloadName
from pasture.bench.workloads import ForkingAgent, build
from tests.unit.bench.stub_openai import StubServer, response, serving


async def played(stub: StubServer, options: BenchOptions) -> list[Exchange]:
    async with serving(stub):
        return await play(build(options), Target(stub.endpoint, "stub", 10.0))


async def test_the_next_question_carries_the_answer_to_the_last() -> None:
    stub = StubServer()
    exchanges = await played(stub, BenchOptions(users=1, turns=3, max_tokens=2))
    assert [len(prompt) for prompt in stub.prompts] == [2, 4, 6]
    assert stub.prompts[1][:2] == stub.prompts[0]
    assert stub.prompts[1][2] == {"role": "assistant", "content": "reply-0 reply-0 "}
    assert [exchange.error for exchange in exchanges] == [None] * 3


async def test_every_request_is_told_as_it_ends() -> None:
    seen: list[str] = []
    async with serving(StubServer()) as stub:
        options = BenchOptions(users=3, turns=2, max_tokens=1)
        await play(build(options), Target(stub.endpoint, "stub", 10.0), lambda exchange: seen.append(exchange.chat.user))
    assert sorted(seen) == sorted(["Ada", "Bruno", "Chloe"] * 2)


async def test_a_failure_ends_its_conversation_and_no_other() -> None:
    stub = StubServer(fail=lambda number: response(500, {}) if number == 0 else None)
    exchanges = await played(stub, BenchOptions(users=2, turns=3, max_tokens=1))
    assert sum(exchange.error is not None for exchange in exchanges) == 1
    assert len(exchanges) == 1 + 3


async def test_the_chosen_branch_becomes_the_context_of_the_next_step() -> None:
    options = BenchOptions(WorkloadName.AGENTS, users=3, turns=2, max_tokens=1)
    (agent,) = build(options).actors
    assert isinstance(agent, ForkingAgent)
    stub = StubServer()
    await played(stub, options)
    first, second = stub.prompts[:3], stub.prompts[3:]
    assert len(second) == 3
    chosen = next(prompt for prompt in first if prompt[-1]["content"] == agent.steps[0].instructions[agent.steps[0].chosen])
    for prompt in second:
        assert prompt[:2] == chosen
        assert prompt[2] == {"role": "assistant", "content": f"reply-{first.index(chosen)} "}


async def test_agents_stop_when_the_chosen_branch_failed() -> None:
    stub = StubServer(fail=lambda _: response(500, {}))
    exchanges = await played(stub, BenchOptions(WorkloadName.AGENTS, users=2, turns=3, max_tokens=1))
    assert len(exchanges) == 2
