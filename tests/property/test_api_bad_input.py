"""Whatever a client sends, the answer is in OpenAI's shape and the fault is never the server's."""

from __future__ import annotations

import asyncio
from urllib.parse import quote

import httpx
import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from pasture.api import ApiSettings, create_app
from pasture.api.response_schemas import ResponseBody
from pasture.api.schemas import ChatBody, CompletionBody
from pasture.api.session_schemas import ForkBody, NewSession, TargetBody, TruncateBody
from pasture.sessions.state import State
from tests.unit.stub_service import StubService

JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**64 - 1),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=8),
        st.sampled_from(["text", "image_url", "user", "assistant", "function", "auto", "stop", "<s>", "-1", "1e999"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "tool_calls", "function", "65", "x"]), inner, max_size=3
        ),
    ),
    max_leaves=6,
)
BODIES = (ChatBody, CompletionBody, ResponseBody, NewSession, ForkBody, TruncateBody, TargetBody)
NAMES = st.sampled_from(sorted({"suffix", "functions", "junk"}.union(*(body.model_fields for body in BODIES))))
FIELDS = st.dictionaries(NAMES, JSON, max_size=4)

GOOD_CHAT: dict[str, object] = {"messages": [{"role": "user", "content": "Hi"}]}
GOOD: dict[str, dict[str, object]] = {
    "/v1/chat/completions": GOOD_CHAT,
    "/v1/completions": {"prompt": "Hi"},
    "/tokenize": {"content": "Hi"},
    "/detokenize": {"tokens": [1]},
    "/apply-template": GOOD_CHAT,
}
STATE = State()
SESSION = STATE.sessions.create(STATE.open_tenant, [{"role": "user", "content": "Hi"}]).session_id
GOOD |= {
    "/v1/responses": {"input": "Hi"},
    "/v1/sessions": {},
    f"/v1/sessions/{SESSION}/fork": {},
    f"/v1/sessions/{SESSION}/truncate": {"messages": 1},
    f"/v1/sessions/{SESSION}/copy": {"target_key": "x"},
    "/v1/sessions/import": {},
}
APP = create_app(StubService(), ApiSettings(max_body_bytes=10_000), state=STATE)


def post(path: str, content: bytes) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(APP), base_url="http://pasture") as client:
            return await client.post(path, content=content)

    return asyncio.run(send())


def check(response: httpx.Response) -> None:
    assert response.status_code in (200, 201, 400, 404, 409, 413, 429), response.text
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(GOOD)), FIELDS)
def test_any_values_in_known_fields(path: str, fields: dict[str, object]) -> None:
    check(post(path, orjson.dumps({**GOOD[path], **fields})))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(GOOD)), st.one_of(st.binary(max_size=40), JSON.map(orjson.dumps)))
def test_any_bytes(path: str, content: bytes) -> None:
    check(post(path, content))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["/v1/sessions", "/v1/chat/completions", "/v1/responses"]), st.integers(1, 1100))
def test_any_depth(path: str, depth: int) -> None:
    content = b"[" * depth + b"]" * depth
    check(
        post(path, b'{"messages":[{"role":"user","content":%s}],"input":[{"role":"user","content":%s}]}' % (content, content))
    )


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=12), st.sampled_from(["sessions", "responses"]), st.sampled_from(["", "/fork", "/pin", "/export"]))
def test_any_id(name: str, kind: str, verb: str) -> None:
    response = post(f"/v1/{kind}/{quote(name, safe='')}{verb}", b"{}")
    assert response.status_code in (307, 400, 404, 405), response.text
