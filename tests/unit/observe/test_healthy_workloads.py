"""The benchmarks' traffic as a log (real text, several turns, an agent's branches): the doctor has nothing to say."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from pasture.bench.options import BenchOptions, WorkloadName
from pasture.bench.recorded import Arrival
from pasture.bench.workloads import Conversation, ForkingAgent, build
from pasture.observe import examine_traffic, read_log

Said = dict[str, str]


def logged(workload: WorkloadName) -> Iterator[str]:
    for actor in build(BenchOptions(workload=workload, users=12, turns=4)).actors:
        assert not isinstance(actor, Arrival)
        messages: list[Said] = [{"role": "system", "content": actor.opening}]
        turns = branches(actor) if isinstance(actor, ForkingAgent) else [(question,) for question in actor.questions]
        user = actor.user if isinstance(actor, Conversation) else "agent"
        for turn, asked in enumerate(turns):
            for text in asked:
                reply = f"<think>{text[:20]}</think> Answer {turn}"
                yield json.dumps({"user": user, "messages": [*messages, {"role": "user", "content": text}], "reply": reply})
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]


def branches(agent: ForkingAgent) -> list[tuple[str, ...]]:
    """The chosen one last, because the conversation goes on from it."""
    return [
        (*(text for text in step.instructions if text != step.instructions[step.chosen]), step.instructions[step.chosen])
        for step in agent.steps
    ]


@pytest.mark.parametrize("workload", [name for name in WorkloadName if name != "trace"])
def test_nothing_is_wrong_with_a_healthy_run(workload: WorkloadName) -> None:
    requests = read_log(logged(workload))
    assert len(requests) > 10
    assert examine_traffic(requests) == []
