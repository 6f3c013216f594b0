"""Whatever the schema allows, and what it does not: no 5xx, no status, type or answer that `/openapi.json` does not document.

Schemathesis draws requests from the schema and sends them over real HTTP to a server over the fake engine, as a tenant and as
the operator; the second test strings calls together, so that ids are of sessions that exist, or did. `PASTURE_TEST_EXAMPLES`
draws more.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from queue import Queue
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
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
from tests.session_support import GREEDY
from tests.store_support import store_for
from tests.unit.stub_service import StubService

N_EXAMPLES = int(os.environ.get("PASTURE_TEST_EXAMPLES", "5"))

EXAMPLES = settings(max_examples=N_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
EXCLUDED: list[CheckFunction] = [positive_data_acceptance, negative_data_rejection, allow_header_conformance]

schemathesis.openapi.media_type("application/vnd.pasture.session", st.binary(max_size=200))

KEY = "a-tenants-key"


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


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server over the fake engine."""
    engine = FakeEngine(PoolShape(4096, 64))
    service = LocalService(engine, store_for(engine), SchedulerSettings(check_invariants=True))
    state = State(keys=(KEY,))
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


@AS_OPERATOR.parametrize()  # type: ignore[untyped-decorator]
@EXAMPLES
def test_the_operators_requests_get_what_is_documented(case: Case[Any], url: str) -> None:
    case.call_and_validate(base_url=url, excluded_checks=EXCLUDED, timeout=30)
