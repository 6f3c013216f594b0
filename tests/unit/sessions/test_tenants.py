from __future__ import annotations

import math
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from pasture.core.errors import Conflict, NotFound, RequestError
from pasture.core.values import DEFAULT_NAMESPACE
from pasture.sessions.state import State
from pasture.sessions.tenants import FRESH_SECONDS, Keyring
from pasture.sessions.values import Limits, Share
from tests.unit.sessions.conftest import Time


def test_a_key_leads_to_its_tenant_and_is_kept_nowhere(state: State, tmp_path: Path) -> None:
    file = tmp_path / "state.db"
    kept = State(str(file))
    secret, key = kept.tenants.add_key("acme", "laptop")
    found = kept.keyring.find(secret.encode())
    assert found is not None
    assert found.name == "acme"
    assert kept.keyring.find(b"pasture-wrong") is None
    assert [one.label for one in kept.tenants.all_keys()] == ["laptop"]
    kept.close()
    assert secret.encode() not in b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert file.stat().st_mode & 0o077 == 0
    assert key.tenant == "acme"


def test_a_revoked_key_opens_nothing_after_a_moment_and_the_server_stays_closed(state: State, clock: Time) -> None:
    assert not state.keyring.closed()
    secret, key = state.tenants.add_key("acme")
    clock.now += FRESH_SECONDS
    assert state.keyring.closed()
    assert state.keyring.find(secret.encode()) is not None
    state.tenants.revoke(key.key_id)
    clock.now += FRESH_SECONDS
    assert state.keyring.remembered(secret.encode()) is None
    assert state.keyring.find(secret.encode()) is None
    assert state.keyring.closed()
    with pytest.raises(NotFound):
        state.tenants.revoke("nothing")


def test_namespaces_are_a_tenants_own_and_follow_from_nothing_a_client_knows(state: State) -> None:
    one, two = state.tenants.create("one"), state.tenants.create("two")
    assert one.namespace() != two.namespace()
    assert "one" not in one.namespace()
    assert one.namespace() == state.tenants.get("one").namespace()
    assert one.namespace(Share.ALL) == two.namespace(Share.ALL) == state.open_tenant.namespace() == DEFAULT_NAMESPACE
    again = State()
    assert again.tenants.create("one").namespace() != one.namespace()
    again.close()


def test_keys_from_the_settings_are_a_tenant_each_and_the_same_one_after_a_restart(state: State) -> None:
    first, second = (Keyring(state.tenants, ["alpha", "beta"]) for _ in range(2))
    alpha, beta = first.find(b"alpha"), first.find(b"beta")
    assert alpha is not None
    assert beta is not None
    assert alpha.namespace() != beta.namespace()
    assert second.find(b"alpha") == alpha
    assert first.closed()
    assert first.find(b"alph") is None


def test_limits_change_one_by_one_and_follow_the_usual_ones_elsewhere() -> None:
    state = State(limits=Limits(idle_seconds=50.0))
    state.tenants.create("acme", weight=2.0)
    state.tenants.limit("acme", tokens_per_minute=100)
    assert state.tenants.get("acme").limits == Limits(weight=2.0, tokens_per_minute=100, idle_seconds=50.0)
    assert state.tenants.limit("acme", tokens_per_minute=None).limits.tokens_per_minute is None
    state.close()


@pytest.mark.parametrize(
    "change",
    [
        {"weight": 0},
        {"max_sessions": -1},
        {"nonsense": 1},
        {"max_sessions": None},
        {"tokens_per_minute": 0},
        {"idle_seconds": math.inf},
        {"idle_seconds": math.nan},
    ],
)
def test_limits_that_make_no_sense_are_refused(state: State, change: dict[str, float | None]) -> None:
    state.tenants.create("acme")
    with pytest.raises(RequestError):
        state.tenants.limit("acme", **change)


def test_names_are_taken_once_and_are_names(state: State) -> None:
    state.tenants.create("acme")
    with pytest.raises(Conflict):
        state.tenants.create("acme")
    for name in ("", "../etc", "a b", "x" * 65):
        with pytest.raises(RequestError):
            state.tenants.create(name)
    with pytest.raises(NotFound):
        state.tenants.get("nobody")


def test_while_the_database_does_not_answer_what_it_said_before_holds(clock: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    state, asked = State(None, clock=clock), 0

    def fails() -> bool:
        nonlocal asked
        asked += 1
        raise OperationalError("SELECT 1", {}, Exception("gone"))

    assert not state.keyring.closed()
    monkeypatch.setattr(state.tenants, "has_keys", fails)
    assert state.keyring.known_closed() is False
    clock.now += FRESH_SECONDS
    assert state.keyring.known_closed() is None
    assert not state.keyring.closed()
    assert not state.keyring.closed()
    assert asked == 1, "a database that is gone is not asked for every request"
    state.close()


def test_a_server_that_never_learnt_whether_there_are_keys_lets_nobody_in(monkeypatch: pytest.MonkeyPatch) -> None:
    state = State(None)

    def fails() -> bool:
        raise OperationalError("SELECT 1", {}, Exception("gone"))

    monkeypatch.setattr(state.tenants, "has_keys", fails)
    with pytest.raises(OperationalError):
        state.keyring.closed()
    state.close()
