"""Whatever a client sends, the answer is in OpenAI's shape and the fault is never the server's."""

from __future__ import annotations

import asyncio

import httpx
import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from pasture.api import ApiSettings, create_app
from pasture.api.schemas import ChatBody, CompletionBody
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
NAMES = st.sampled_from(sorted(set(ChatBody.model_fields) | set(CompletionBody.model_fields) | {"suffix", "functions", "junk"}))
FIELDS = st.dictionaries(NAMES, JSON, max_size=4)

GOOD_CHAT: dict[str, object] = {"messages": [{"role": "user", "content": "Hi"}]}
GOOD: dict[str, dict[str, object]] = {
    "/v1/chat/completions": GOOD_CHAT,
    "/v1/completions": {"prompt": "Hi"},
    "/tokenize": {"content": "Hi"},
    "/detokenize": {"tokens": [1]},
    "/apply-template": GOOD_CHAT,
}
APP = create_app(StubService(), ApiSettings(max_body_bytes=10_000))


def post(path: str, content: bytes) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(APP), base_url="http://pasture") as client:
            return await client.post(path, content=content)

    return asyncio.run(send())


def check(response: httpx.Response) -> None:
    assert response.status_code in (200, 400, 413), response.text
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(GOOD)), FIELDS)
def test_any_values_in_known_fields(path: str, fields: dict[str, object]) -> None:
    check(post(path, orjson.dumps({**GOOD[path], **fields})))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(GOOD)), st.one_of(st.binary(max_size=40), JSON.map(orjson.dumps)))
def test_any_bytes(path: str, content: bytes) -> None:
    check(post(path, content))
