from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from pasture.bench.corpus import CHARACTERS_PER_TOKEN
from pasture.bench.options import Arrivals, BenchOptions, WorkloadName
from pasture.bench.workloads import Conversation, ForkingAgent, Workload, build


def conversations(workload: Workload) -> list[Conversation]:
    return [actor for actor in workload.actors if isinstance(actor, Conversation)]


def tokens(text: str) -> float:
    return len(text) / CHARACTERS_PER_TOKEN


@pytest.mark.parametrize("name", sorted(set(WorkloadName) - {WorkloadName.TRACE}))
def test_a_seed_decides_everything(name: WorkloadName) -> None:
    assert build(BenchOptions(name, seed=3)) == build(BenchOptions(name, seed=3))
    assert build(BenchOptions(name, seed=3)) != build(BenchOptions(name, seed=4))


def test_a_team_has_one_opening_and_conversations_of_its_own() -> None:
    users = conversations(build(BenchOptions(WorkloadName.TEAM, users=40, turns=3)))
    assert len({user.opening for user in users}) == 1
    assert 900 < tokens(users[0].opening) < 1100
    assert len({user.user for user in users}) == 40
    assert len({user.questions for user in users}) == 40
    assert all(len(user.questions) == 3 for user in users)


def test_documents_are_few_long_and_unevenly_popular() -> None:
    users = conversations(build(BenchOptions(WorkloadName.DOCS, users=200, turns=3)))
    popularity = Counter(user.opening for user in users)
    assert len(popularity) == 4
    assert all(1950 < tokens(document) < 2200 for document in popularity)
    assert max(popularity.values()) > 2 * min(popularity.values())
    assert {len(user.questions) for user in users} == {1, 2, 3}


def test_private_contexts_differ_from_their_first_word_on() -> None:
    users = conversations(build(BenchOptions(WorkloadName.PRIVATE, users=20)))
    assert len({user.opening.split()[0] for user in users}) == 20
    assert all(950 < tokens(user.opening) < 1150 for user in users)


def test_agents_fork_one_context_at_every_step() -> None:
    workload = build(BenchOptions(WorkloadName.AGENTS))
    (agent,) = workload.actors
    assert isinstance(agent, ForkingAgent)
    assert [len(step.instructions) for step in agent.steps] == [8, 8, 8]
    assert all(len(set(step.instructions)) == 8 for step in agent.steps)
    assert all(0 <= step.chosen < 8 for step in agent.steps)
    assert workload.n_requests == 24


def test_staggered_users_come_one_after_another() -> None:
    together = conversations(build(BenchOptions(users=16)))
    staggered = conversations(build(BenchOptions(users=16, arrivals=Arrivals.STAGGERED)))
    assert {user.pauses_seconds[0] for user in together} == {0.0}
    starts = [user.pauses_seconds[0] for user in staggered]
    assert all(earlier < later for earlier, later in pairwise(starts))
    assert [user.questions for user in staggered] != []


def test_think_time_lies_between_questions_and_not_before_the_first() -> None:
    users = conversations(build(BenchOptions(users=50, turns=3, think_time=2.0)))
    pauses = [pause for user in users for pause in user.pauses_seconds[1:]]
    assert {user.pauses_seconds[0] for user in users} == {0.0}
    assert 1.0 < sum(pauses) / len(pauses) < 3.0


def test_more_users_than_asked_for_by_the_options_for_a_search() -> None:
    assert len(build(BenchOptions(users=2), users=5).actors) == 5


def test_a_shared_pool_needs_less_than_a_context_each() -> None:
    workload = build(BenchOptions(WorkloadName.TEAM, users=16))
    assert workload.opening_tokens < workload.longest_tokens
    assert workload.longest_tokens < workload.pool_tokens < 16 * workload.longest_tokens / 2
