from __future__ import annotations

import httpx
import pytest

from pasture.api import ApiSettings
from tests.unit.api.conftest import Connect
from tests.unit.api.wire import CHAT, chat_body, error_of
from tests.unit.stub_service import StubService

KEYS = ApiSettings(api_keys=("sk-one", "sk-twö"))


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic sk-one"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer sk-on"},
        {"x-api-key": "wrong"},
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/metrics", "/props", "/slots", "/nowhere"])
async def test_without_a_valid_key_nothing_answers(connect: Connect, path: str, headers: dict[str, str]) -> None:
    response = await connect(StubService(), KEYS).post(path, json=chat_body(), headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert error_of(response)["code"] == "invalid_api_key"


async def test_any_of_the_keys_opens(connect: Connect) -> None:
    client = connect(StubService(), KEYS)
    for name, value in (
        (b"authorization", b"Bearer sk-one"),
        (b"authorization", b"bearer  sk-tw\xc3\xb6"),
        (b"x-api-key", b"sk-one"),
    ):
        assert (await client.get("/v1/models", headers=[(name, value)])).status_code == 200


async def test_health_needs_no_key(connect: Connect) -> None:
    client = connect(StubService(), KEYS)
    for path in ("/health", "/health/live", "/health/ready"):  # some load balancers send HEAD
        assert (await client.get(path)).status_code == 200
        assert (await client.head(path)).status_code == 200


async def test_who_asks_is_the_named_user_or_the_key_or_the_address(connect: Connect) -> None:
    service = StubService()
    keyed = connect(service, KEYS)
    await keyed.post(CHAT, json=chat_body(user="ann"), headers={"authorization": "Bearer sk-one"})
    await keyed.post(CHAT, json=chat_body(), headers={"authorization": "Bearer sk-one"})
    await keyed.post(CHAT, json=chat_body(), headers={"x-api-key": "sk-one"})
    await connect(service).post(CHAT, json=chat_body())
    named, by_bearer, by_header, by_address = (request.user for request in service.requests)
    assert named == "ann"
    assert by_bearer == by_header
    assert by_bearer.startswith("key:")
    assert "sk-one" not in by_bearer
    assert by_address == "127.0.0.1"


async def test_request_ids_are_echoed_or_made(client: httpx.AsyncClient) -> None:
    assert (await client.get("/health", headers={"x-request-id": "abc-1"})).headers["x-request-id"] == "abc-1"
    made = [(await client.get("/nowhere")).headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1]
    odd = await client.get("/health", headers={"x-request-id": "a" * 500})
    assert len(odd.headers["x-request-id"]) == 32


async def test_pages_of_other_origins_are_let_in_only_where_configured(connect: Connect) -> None:
    ask = {"origin": "https://app.example", "access-control-request-method": "POST"}
    settings = ApiSettings(api_keys=("sk-one",), cors_origins=("https://app.example",))
    allowed = await connect(StubService(), settings).options(CHAT, headers=ask)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    closed = await connect(StubService()).options(CHAT, headers=ask)
    assert "access-control-allow-origin" not in closed.headers
