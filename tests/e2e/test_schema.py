"""Whatever the schema allows, and what it does not: no 5xx, no status, type or answer that `/openapi.json` does not document.

Schemathesis draws requests from the schema and sends them over real HTTP to a server over the fake engine, as a tenant and as
the operator. What it draws for an id names nothing that there is, so one test makes a session and a response first, and sends
each request that can name them twice: of what exists, and of what the first one has left. `PASTURE_TEST_EXAMPLES` draws more.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Queue
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from schemathesis import AuthContext, Case
from schemathesis.checks import CheckFunction
from schemathesis.specs.openapi.checks import allow_header_conformance, negative_data_rejection, positive_data_acceptance

from pasture.api import create_app
from pasture.api.server import DrainingServer, ServerOptions, bind
from pasture.core.values import PoolShape
from pasture.engine.fake import FakeEngine
from pasture.scheduler.service import LocalService
from pasture.scheduler.settings import SchedulerSettings
from pasture.sessions.state import State
from pasture.sessions.values import Limits
from tests.session_support import GREEDY
from tests.store_support import store_for
from tests.unit.stub_service import StubService

N_EXAMPLES = int(os.environ.get("PASTURE_TEST_EXAMPLES", "5"))

EXAMPLES = settings(max_examples=N_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
DRAWN = settings(EXAMPLES, max_examples=2 * N_EXAMPLES, phases=(Phase.generate, Phase.shrink))
"""without the hundreds of boundary cases of each field"""
EXCLUDED: list[CheckFunction] = [positive_data_acceptance, negative_data_rejection, allow_header_conformance]

schemathesis.openapi.media_type("application/vnd.pasture.session", st.binary(max_size=200))

SAID: list[Any] = [{"role": "user", "content": "Hi"}]
KEY, OTHER_KEY = "a-tenants-key", "another-tenants-key"


def described(key: str) -> Any:
    """The schema, for a client with this key. The endless stream of the dashboard is left out."""
    found = schemathesis.openapi.from_dict(create_app(StubService(), GREEDY).openapi()).exclude(path="/v1/live")

    @found.auth()
    class Auth:
        def get(self, case: Case[Any], context: AuthContext) -> str:
            return key

        def set(self, case: Case[Any], data: str, context: AuthContext) -> None:
            case.headers["authorization"] = f"Bearer {data}"

    return found


AS_TENANT, AS_OPERATOR = described(KEY), described("admin").include(path_regex="admin|metrics|slots|diagnosis|live")
WITH_IDS = described(KEY).include(path_regex="session_id|response_id|/v1/chat|/v1/responses")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server over the fake engine."""
    engine = FakeEngine(PoolShape(4096, 64))
    service = LocalService(engine, store_for(engine), SchedulerSettings(check_invariants=True))
    state = State(keys=(KEY, OTHER_KEY), limits=Limits(max_live_cells=256))  # replies are not drawn for their length
    started: Queue[str] = Queue()
    running = DrainingServer(create_app(service, GREEDY, state=state), ServerOptions(), started.put)
    thread = threading.Thread(target=running.run, args=([bind("127.0.0.1", 0)],))
    thread.start()
    yield started.get()
    running.handle_exit(0, None)
    thread.join()
    service.close()
    state.close()


@AS_TENANT.parametrize()  # type: ignore[untyped-decorator]
@EXAMPLES
def test_a_tenants_requests_get_what_is_documented(case: Case[Any], url: str) -> None:
    case.call_and_validate(base_url=url, excluded_checks=EXCLUDED, timeout=30)


@contextmanager
def something_said(url: str) -> Iterator[dict[str, str]]:
    """A session with a turn in it, and a response, by what requests call their ids; both are gone behind the block."""
    with httpx.Client(base_url=f"{url}/v1", headers={"authorization": f"Bearer {KEY}"}) as client:
        session = client.post("/sessions", json={"messages": SAID}).json()["id"]
        turn = {"session_id": session, "messages": SAID, "max_tokens": 2}
        assert client.post("/chat/completions", json=turn).status_code == 200
        response = client.post("/responses", json={"input": "Hi", "max_output_tokens": 2}).json()["id"]
        yield {"session_id": session, "response_id": response, "previous_response_id": response, "target_key": OTHER_KEY}
        client.delete(f"/sessions/{session}")
        client.delete(f"/responses/{response}")


def naming(case: Case[Any], ids: dict[str, str]) -> None:
    """Have a request name these wherever it names anything."""
    for place in (case.path_parameters, case.body):
        if isinstance(place, dict):
            place |= {name: made for name, made in ids.items() if name in place}
            if isinstance(place.get("messages"), list):
                place["messages"] = SAID


@WITH_IDS.parametrize()  # type: ignore[untyped-decorator]
@DRAWN
def test_so_do_requests_about_what_there_is_and_what_has_just_been_there(case: Case[Any], url: str) -> None:
    with something_said(url) as ids:
        naming(case, ids)
        for _ in range(2):
            case.call_and_validate(base_url=url, excluded_checks=EXCLUDED, timeout=30)


@AS_OPERATOR.parametrize()  # type: ignore[untyped-decorator]
@EXAMPLES
def test_the_operators_requests_get_what_is_documented(case: Case[Any], url: str) -> None:
    case.call_and_validate(base_url=url, excluded_checks=EXCLUDED, timeout=30)
