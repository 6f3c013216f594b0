from __future__ import annotations

import pytest

from pasture.core.errors import NotFound, RateLimited
from pasture.sessions.state import State
from pasture.sessions.values import Tenant
from tests.unit.sessions.conftest import Time, rows, stored_bytes
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


def test_somebody_elses_is_the_same_as_none(state: State, tenant: Tenant) -> None:
    stranger = state.tenants.create("stranger")
    state.responses.add(tenant, "r1", {}, say("a", "b"))
    for response_id in ("r1", "r9"):
        for call in (state.responses.get, state.responses.open, state.responses.delete):
            with pytest.raises(NotFound, match=f"there is no response '{response_id}'"):
                call(stranger, response_id)
        with pytest.raises(NotFound):
            state.responses.add(stranger, "mine", {}, say("c"), previous=response_id)
