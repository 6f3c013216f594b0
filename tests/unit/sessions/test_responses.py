from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import replace

import pytest

from pasture.core.errors import NotFound, RateLimited
from pasture.sessions.state import State
from pasture.sessions.values import Tenant
from tests.unit.sessions.conftest import Time, check_books, rows, statements, stored_bytes
from tests.unit.sessions.test_store import say


@pytest.fixture
def tenant(state: State) -> Tenant:
    return state.tenants.create("acme", max_responses=3)


def test_each_response_goes_on_from_the_one_before(state: State, tenant: Tenant) -> None:
    state.responses.add(tenant, "r1", {"n": 1}, say("a", "b"))
    state.responses.add(tenant, "r2", {"n": 2}, say("c", "d"), previous="r1")
    state.responses.add(tenant, "r3", {"n": 3}, say("e", "f"), previous="r1")
    assert state.responses.open(tenant, "r2")[1] == say("a", "b", "c", "d")
    assert state.responses.open(tenant, "r3")[1] == say("a", "b", "e", "f")
    assert state.responses.get(tenant, "r2").body == {"n": 2}
    assert rows(state, "turns") == 3


def test_deleting_one_leaves_what_goes_on_from_it_its_past(state: State, tenant: Tenant) -> None:
    state.responses.add(tenant, "r1", {}, say("a", "b"))
    state.responses.add(tenant, "r2", {}, say("c", "d"), previous="r1")
    state.responses.delete(tenant, "r1")
    assert state.responses.open(tenant, "r2")[1] == say("a", "b", "c", "d")
    with pytest.raises(NotFound):
        state.responses.add(tenant, "r3", {}, say("e", "f"), previous="r1")
    state.responses.delete(tenant, "r2")
    assert rows(state, "turns") == stored_bytes(state) == 0


def test_the_longest_unused_makes_way(state: State, tenant: Tenant, clock: Time) -> None:
    for name in ("r1", "r2", "r3"):
        clock.now += 1
        state.responses.add(tenant, name, {}, say(name, "reply"))
    clock.now += 1
    state.responses.open(tenant, "r1")
    clock.now += 1
    state.responses.add(tenant, "r4", {}, say("d", "reply"))
    with pytest.raises(NotFound):
        state.responses.get(tenant, "r2")
    assert rows(state, "responses") == 3


def test_bytes_make_way_too_and_what_never_fits_is_refused(state: State, clock: Time) -> None:
    tenant = state.tenants.create("small", max_transcript_bytes=400)
    for i in range(10):
        clock.now += 1
        state.responses.add(tenant, f"r{i}", {}, say("x" * 20, "reply"))
    assert 0 < rows(state, "responses") < 10
    assert stored_bytes(state) <= 400
    with pytest.raises(RateLimited):
        state.responses.add(tenant, "large", {}, say("x" * 500, "reply"))
    assert rows(state, "responses") > 0, "what could not be kept pushed nothing out"


def test_where_no_response_can_make_room_none_goes_and_nobody_who_writes_waits(
    state: State, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = state.tenants.create("small", max_transcript_bytes=20_000)
    for i in range(40):
        clock.now += 1
        state.responses.add(tenant, f"r{i}", {}, say("x", "reply"), previous=f"r{i - 1}" if i % 4 else None)
    state.sessions.create(tenant, say("x" * (19_000 - stored_bytes(state))))
    with monkeypatch.context() as patch, statements(state) as asked:
        patch.setattr(state.database, "write", lambda: pytest.fail("took everybody's turn to write"))
        with pytest.raises(RateLimited):
            state.responses.add(tenant, "large", {}, say("y" * 10_000, "reply"), previous="r7")
    assert len(asked) < 20, "found out for many responses at a time"
    assert rows(state, "responses") == 40
    state.responses.add(tenant, "fits", {}, say("y" * 2000, "reply"), previous="r7")
    assert state.responses.open(tenant, "fits")[1][:-2] == say(*["x", "reply"] * 4), "its past stays with it"
    check_books(state)


def test_many_make_way_in_few_statements(state: State, tenant: Tenant, clock: Time) -> None:
    roomy = replace(tenant, limits=replace(tenant.limits, max_responses=1000))
    for i in range(300):
        clock.now += 1
        state.responses.add(roomy, f"r{i}", {}, say("x", "reply"), previous=f"r{i - 1}" if i % 100 else None)
    with statements(state) as asked:
        state.responses.add(tenant, "last", {}, say("y", "reply"), previous="r0")
    assert len(asked) < 30
    assert rows(state, "responses") == 3
    assert len(state.responses.open(tenant, "r299")[1]) == 200
    check_books(state)


def test_the_books_are_right_whatever_makes_way(state: State, clock: Time) -> None:
    tenant = state.tenants.create("small", max_transcript_bytes=1500, max_responses=12)
    chance = random.Random(7)
    kept: list[str] = []
    for i in range(150):
        clock.now += 1
        previous = chance.choice([*kept[-6:], None])
        with suppress(NotFound, RateLimited):  # it has made way itself, or has too long a past
            state.responses.add(tenant, f"r{i}", {"n": i}, say("x" * chance.randrange(200), "reply"), previous=previous)
            kept.append(f"r{i}")
        if i % 10 == 0:
            check_books(state)
        assert stored_bytes(state) <= 1500
        assert rows(state, "responses") <= 12


def test_somebody_elses_is_the_same_as_none(state: State, tenant: Tenant) -> None:
    stranger = state.tenants.create("stranger")
    state.responses.add(tenant, "r1", {}, say("a", "b"))
    for response_id in ("r1", "r9"):
        for call in (state.responses.get, state.responses.open, state.responses.delete):
            with pytest.raises(NotFound, match=f"there is no response '{response_id}'"):
                call(stranger, response_id)
        with pytest.raises(NotFound):
            state.responses.add(stranger, "mine", {}, say("c"), previous=response_id)
