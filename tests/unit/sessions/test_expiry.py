"""Whatever was created and left is gone after its time: rows, bytes, and nothing of anybody who is still there."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from contextlib import closing
from itertools import count

import pytest

from pasture.core.values import Namespace
from pasture.sessions.expiry import Swept
from pasture.sessions.state import State
from pasture.sessions.values import DAY_SECONDS, Counters, Limits, Share
from tests.unit.sessions.conftest import Time, rows, stored_bytes
from tests.unit.sessions.test_store import say

N_SESSIONS = int(os.environ.get("PASTURE_TEST_SESSIONS", "600"))


def test_what_nobody_uses_is_forgotten_after_its_tenants_time(state: State, clock: Time) -> None:
    patient = state.tenants.create("patient", idle_seconds=1000.0)
    hasty = state.tenants.create("hasty", idle_seconds=10.0)
    old, used, pinned = (state.sessions.create(hasty, say(name)) for name in ("old", "used", "pinned"))
    kept = state.sessions.create(patient, say("kept"))
    state.sessions.pin(hasty, pinned.session_id, True)
    state.responses.add(hasty, "r1", {}, say("a", "b"))
    clock.now += 9
    state.sessions.advance(hasty, used.session_id, say("used", "b"), n_tokens=1, used=Counters())
    clock.now += 2
    assert state.expiry.sweep() == Swept(1, 1)
    left = {session.session_id for session in (*state.sessions.page(hasty), *state.sessions.page(patient))}
    assert left == {used.session_id, pinned.session_id, kept.session_id}
    assert old.session_id not in left


def test_nothing_lives_for_ever_however_often_it_is_used(state: State, clock: Time) -> None:
    made = state.sessions.create(state.open_tenant, say("a"))
    for _ in range(31):
        clock.now += DAY_SECONDS
        state.sessions.truncate(state.open_tenant, made.session_id, 1)
    assert state.expiry.sweep().sessions == 1


def test_many_sessions_leave_nothing_behind(state: State, clock: Time) -> None:
    tenant = state.tenants.create("busy", max_sessions=N_SESSIONS + 1)
    system = say("the same long beginning " * 20)
    for i in range(N_SESSIONS // 3):
        made = state.sessions.create(tenant, system)
        state.sessions.advance(tenant, made.session_id, [*system, *say(f"{i}", "b")], n_tokens=9, used=Counters(1, 9, 0, 1))
        state.sessions.fork(tenant, made.session_id, 2)
        state.responses.add(tenant, f"r{i}", {"text": "b"}, say(f"{i}", "b"), previous=f"r{i - 1}" if i % 5 else None)
    assert rows(state, "sessions") == N_SESSIONS // 3 * 3
    clock.now += 8 * DAY_SECONDS
    assert state.expiry.sweep() == Swept(N_SESSIONS // 3 * 3, N_SESSIONS // 3)
    assert rows(state, "sessions") == rows(state, "responses") == rows(state, "turns") == stored_bytes(state) == 0


def test_tenants_with_a_time_of_their_own_are_told_with_every_sweep() -> None:
    state, told, twice = State(limits=Limits(idle_seconds=500.0)), list[Mapping[Namespace, float]](), threading.Event()
    state.tenants.create("usual", max_sessions=5)
    same = state.tenants.create("same", idle_seconds=500.0)
    hasty = state.tenants.create("hasty", idle_seconds=10.0)

    def keep_kv(seconds: Mapping[Namespace, float]) -> None:
        if told and seconds != told[-1]:
            twice.set()
        told.append(seconds)

    state.keep_sweeping(keep_kv, 0.01)
    try:
        while not told:
            time.sleep(0.001)
        state.tenants.limit("hasty", idle_seconds=20.0)
        assert twice.wait(10)
    finally:
        state.close()
    assert told[0] == {hasty.namespace(): 10.0, same.namespace(): 500.0}
    assert told[-1] == {hasty.namespace(): 20.0, same.namespace(): 500.0}


def test_where_everybody_shares_one_namespace_nobody_has_a_time_of_their_own() -> None:
    with closing(State(share=Share.ALL)) as state:
        state.tenants.create("hasty", idle_seconds=10.0)
        assert not state.idle_seconds()


def test_the_sweeper_ends_with_the_state() -> None:
    state, kept = State(), list[Mapping[Namespace, float]]()
    state.keep_sweeping(kept.append, 3600.0)
    state.close()
    assert state._sweeper is not None
    assert not state._sweeper.is_alive()


def test_the_sweeper_goes_on_whatever_went_wrong_and_says_when_it_last_did_well(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    state, rounds, went_on = State(), count(), threading.Event()
    assert state.sweeper is None

    def sweep() -> Swept:
        match next(rounds):
            case 0:
                raise ValueError("a bad row")
            case 2:
                went_on.set()
        return Swept(0, 0)

    monkeypatch.setattr(state.expiry, "sweep", sweep)
    state.keep_sweeping(lambda _: None, 0.001)
    assert went_on.wait(10)
    assert "a bad row" in caplog.text
    assert state.sweeper is not None
    assert not state.sweeper.late
    state.close()
    assert state.sweeper.late
