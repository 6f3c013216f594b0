"""Everybody's sessions, for the admin key: in pages, with where each one's KV is, and nothing of what was said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import httpx
import pytest
from pydantic import TypeAdapter

from pasture.api import ApiSettings, create_app
from pasture.api.gateway import Gateway
from pasture.core.errors import RequestError
from pasture.core.values import Namespace, Whereabouts
from pasture.sessions.state import State
from pasture.sessions.values import Counters, Tenant
from tests.unit.stub_service import StubService

SECRET = "the password is sheep"
PATH = "/v1/admin/sessions"
ROOT = {"authorization": "Bearer root"}


class Located(StubService):
    """Notes whose tokens were asked about."""

    def __init__(self) -> None:
        super().__init__(found=Whereabouts(20, 2, 15, {"disk": 10}))
        self.asked: list[tuple[Namespace, int, bool]] = []

    async def locate(self, namespace: Namespace, tokens: Sequence[int], *, deep: bool = False) -> Whereabouts:
        self.asked.append((namespace, len(tokens), deep))
        return await super().locate(namespace, tokens, deep=deep)


class Ticking:
    """A clock that goes on by a second whenever somebody looks."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def state() -> Iterator[State]:
    made = State(keys=("theirs",), wall_clock=Ticking())
    yield made
    made.close()


def client_of(service: StubService, state: State, admin_key: str | None = "root") -> httpx.AsyncClient:
    app = create_app(service, ApiSettings(api_keys=("theirs",), admin_key=admin_key), state=state)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://pasture")


def say(state: State, tenant: Tenant, name: str) -> None:
    said = [{"role": "user", "content": SECRET}]
    state.sessions.go_on_named(tenant, name, said, n_tokens=7, used=Counters(1, 40, 30, 2))


async def test_all_tenants_sessions_come_in_pages_the_last_used_first(state: State) -> None:
    one, two = state.tenants.create("one"), state.tenants.create("two")
    for name, tenant in (("a", one), ("b", two), ("c", one)):
        say(state, tenant, name)
    service = Located()
    async with client_of(service, state) as client:
        first = (await client.get(PATH, params={"limit": 2}, headers=ROOT)).json()
        rest = (await client.get(PATH, params={"limit": 2, "offset": 2}, headers=ROOT)).json()
    assert [(row["tenant"], row["name"]) for row in first["data"] + rest["data"]] == [("one", "c"), ("two", "b"), ("one", "a")]
    assert (first["total"], rest["total"]) == (3, 3)
    row = first["data"][0]
    assert row["tiers"] == {"live": 20, "ram": 15, "disk": 10}
    assert row["usage"] == {"requests": 1, "prompt_tokens": 40, "cached_tokens": 30, "reply_tokens": 2}
    assert row["idle_seconds"] > 0
    namespaces = [namespace for namespace, _, _ in service.asked]
    assert Counter(namespaces) == {one.namespace(): 2, two.namespace(): 1}
    assert all(deep and n_tokens == row["n_tokens"] for _, n_tokens, deep in service.asked)


async def test_nothing_of_what_was_said_is_in_it(state: State) -> None:
    one = state.tenants.create("one")
    state.sessions.create(one, [{"role": "user", "content": SECRET}], metadata={"about": SECRET}, context={"x": SECRET})
    async with client_of(Located(), state) as client:
        answer = await client.get(PATH, headers=ROOT)
    assert answer.json()["total"] == 1
    assert "password" not in answer.text
    assert one.namespace() not in answer.text


async def test_it_is_the_admin_keys_alone(state: State) -> None:
    async with client_of(Located(), state) as client:
        assert (await client.get(PATH)).status_code == 401
        assert (await client.get(PATH, headers={"authorization": "Bearer theirs"})).status_code == 401
        assert (await client.get(PATH, params={"limit": 51}, headers=ROOT)).status_code == 400
    async with client_of(Located(), state, admin_key=None) as client:
        assert (await client.get(PATH, headers={"authorization": "Bearer theirs"})).status_code == 404


async def test_a_tenant_whom_nobody_knows_any_more_has_its_sessions_still(state: State) -> None:
    say(state, Tenant("key-that-was-in-the-settings", b"salt"), "a")
    service = Located()
    async with client_of(service, state) as client:
        (row,) = (await client.get(PATH, headers=ROOT)).json()["data"]
    assert (row["tiers"], row["n_tokens"], service.asked) == (None, 7, [])


@pytest.mark.parametrize("of", ["locate", "session_tokens"])
async def test_what_this_model_cannot_read_is_listed_all_the_same(
    state: State, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    say(state, state.tenants.create("one"), "a")
    service = Located()

    async def refuse(*_: object, **__: object) -> Whereabouts:
        if of == "session_tokens":
            TypeAdapter(int).validate_python("too much of it")
        raise RequestError("no replica can be asked now")

    monkeypatch.setattr(service if of == "locate" else Gateway, of, refuse)
    async with client_of(service, state) as client:
        (row,) = (await client.get(PATH, headers=ROOT)).json()["data"]
    assert (row["tiers"], row["n_tokens"]) == (None, 7)
