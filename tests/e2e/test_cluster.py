"""A cluster on Ray, as processes: replicas are killed while they write, drained and replaced; clients notice a pause at most.

The engines are fake, at the pace of real ones, so what a client should read is known to the token. `PASTURE_KILLS=50` has as
many replicas killed as that says; a few otherwise.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pasture.bench.client import call, call_json
from pasture.bench.cluster_process import ClusterProcess
from pasture.core.values import SamplingParams
from pasture.engine.fake import END_TOKEN, FakeVocabulary, expected_reply

pytestmark = pytest.mark.timeout(int(os.environ.get("PASTURE_KILLS", "0")) * 15 + 240)

KILLS = int(os.environ.get("PASTURE_KILLS", "3"))
USERS = 16
GREEDY = SamplingParams(temperature=0, logit_bias={END_TOKEN: -math.inf})
SYSTEM = [i % 200 for i in range(150)]
N_REPLICAS = 3


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcess]:
    flags = ("--fake-engine", "--fake-pace", "0.01,0.00002", "-np", "32", "-c", "65536", "--kv-layout", "unified")
    made = ClusterProcess(tmp_path_factory.mktemp("cluster"), *flags, replicas=N_REPLICAS)
    try:
        yield made
    finally:
        made.close()


def text_of(tokens: list[int]) -> str:
    return b"".join(FakeVocabulary().piece(token) for token in tokens).decode("utf-8", "replace")


async def complete(cluster: ClusterProcess, prompt: list[int], max_tokens: int) -> dict[str, Any]:
    """A streamed greedy reply: its text, its finish and its usage; fails unless the stream is whole."""
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    status, data = await call(cluster.endpoint, "/v1/completions", body, timeout_seconds=120)
    assert status == 200, data
    events = [line.removeprefix(b"data: ") for line in data.splitlines() if line.startswith(b"data: ")]
    assert events[-1] == b"[DONE]", "the stream ends as it should"
    chunks = [json.loads(event) for event in events[:-1]]
    assert not any("error" in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    usage = next(chunk["usage"] for chunk in reversed(chunks) if chunk.get("usage"))
    return {"text": "".join(c["text"] for c in choices), "finish": choices[-1]["finish_reason"], "usage": usage}


async def check(cluster: ClusterProcess, prompt: list[int], max_tokens: int) -> None:
    """The reply is the undisturbed run's, to the letter."""
    found = await complete(cluster, prompt, max_tokens)
    assert found["text"] == text_of(expected_reply(prompt, max_tokens, GREEDY)), "what one machine would have written"
    assert found["finish"] == "length"
    assert found["usage"]["prompt_tokens"] == len(prompt)
    assert found["usage"]["completion_tokens"] == max_tokens


async def test_no_client_fails_while_replicas_are_killed(cluster: ClusterProcess) -> None:
    await cluster.until(lambda found: len(found) == N_REPLICAS)
    chance = random.Random(1)
    ended = asyncio.Event()
    answered = 0

    async def user(number: int) -> None:
        nonlocal answered
        turn = 0
        while not ended.is_set():
            await check(cluster, [number, turn % 200, *SYSTEM], 150)
            answered, turn = answered + 1, turn + 1

    async with asyncio.TaskGroup() as group:
        for number in range(USERS):
            group.create_task(user(number))
        epochs = set()
        for _ in range(KILLS):
            there = await cluster.until(lambda found: len(found) == N_REPLICAS)
            await asyncio.sleep(chance.random())
            victim = chance.choice(there)
            epochs.add(victim["epoch"])
            os.kill(int(str(victim["pid"])), signal.SIGKILL)
            await cluster.until(lambda found: not epochs & {one["epoch"] for one in found})
        ended.set()
    assert answered >= USERS
    assert len(epochs) == KILLS
    there = await cluster.until(lambda found: len(found) == N_REPLICAS)
    assert not epochs & {one["epoch"] for one in there}


async def test_a_replica_that_comes_back_is_credited_with_nothing(cluster: ClusterProcess) -> None:
    there = await cluster.until(lambda found: len(found) == N_REPLICAS)
    for number in range(12):
        await check(cluster, [number, *SYSTEM], 4)
    there = await cluster.until(lambda found: all(int(str(one["known_blocks"])) for one in found))
    victim = there[0]
    await asyncio.to_thread(cluster.run, "cordon", str(victim["replica"]))
    assert await cluster.until(lambda found: [one["replica"] for one in found if one["draining"]] == [victim["replica"]])
    await check(cluster, [99, *SYSTEM], 4)
    os.kill(int(str(victim["pid"])), signal.SIGKILL)
    back = await cluster.until(
        lambda found: any(one["replica"] == victim["replica"] and one["epoch"] != victim["epoch"] for one in found)
    )
    again = next(one for one in back if one["replica"] == victim["replica"])
    assert (again["known_blocks"], again["draining"]) == (0, False)


async def test_sessions_are_the_same_whoever_answers(cluster: ClusterProcess) -> None:
    made = await call_json(cluster.endpoint, "/v1/sessions", {"metadata": {"a": "1"}})
    status, data = await call(cluster.endpoint, "/v1/sessions", {"name": "s"})
    assert (made, status) == (None, 201), "a new session is a 201"
    session_id = json.loads(data)["id"]
    body: Any = {"session_id": session_id, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 6}
    for turn in range(4):
        answer = await call_json(cluster.endpoint, "/v1/chat/completions", body)
        assert answer is not None
        shown = await call_json(cluster.endpoint, f"/v1/sessions/{session_id}")
        assert shown is not None
        assert shown["n_messages"] == 2 * (turn + 1)


async def test_a_session_moves_where_it_is_told_to(cluster: ClusterProcess) -> None:
    there = await cluster.until(lambda found: len(found) == N_REPLICAS)
    _, data = await call(cluster.endpoint, "/v1/sessions", {"messages": [{"role": "system", "content": "x" * 300}]})
    session_id = json.loads(data)["id"]
    body: Any = {"session_id": session_id, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 6}
    assert await call_json(cluster.endpoint, "/v1/chat/completions", body) is not None
    for one in there:
        move: Any = {"replica": one["replica"]}
        status, data = await call(cluster.endpoint, f"/v1/sessions/{session_id}/move", move)
        assert status == 201, data
        moved = json.loads(data)
        assert moved["carried_tokens"] >= moved["tokens"] - 20, "all but what the template adds behind the reply"
    status, data = await call(cluster.endpoint, f"/v1/sessions/{session_id}/move", {"replica": "r99"})
    assert status == 404


async def test_draining_a_replica_with_a_hundred_sessions_loses_none(cluster: ClusterProcess) -> None:
    await cluster.until(lambda found: len(found) == N_REPLICAS)
    prompts = [[number % 200, number // 200, *SYSTEM[: 70 + number % 80]] for number in range(360)]
    said: list[list[int]] = []
    for start in range(0, len(prompts), 40):
        part = prompts[start : start + 40]
        await asyncio.gather(*(check(cluster, prompt, 5) for prompt in part))
        said += [prompt + expected_reply(prompt, 5, GREEDY) for prompt in part]
    told = await asyncio.to_thread(cluster.run, "drain", "r2")
    found = re.search(r"r2: (\d+) of (\d+) conversations handed over", told)
    assert found, told
    carried, conversations = map(int, found.groups())
    assert carried == conversations >= 100
    left = await cluster.until(lambda found: len(found) == N_REPLICAS - 1)
    assert "r2" not in {one["replica"] for one in left}
    for start in range(0, len(said), 40):
        part = said[start : start + 40]
        answers = await asyncio.gather(*(complete(cluster, [*tokens, 1, 2, 3], 2) for tokens in part))
        for tokens, answer in zip(part, answers, strict=True):
            cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert cached >= len(tokens) - 1, "at most one old token is computed again"
    assert "3 replicas" in await asyncio.to_thread(cluster.run, "scale", "3")
    await cluster.until(lambda found: len(found) == N_REPLICAS)


async def test_status_tells_of_every_part(cluster: ClusterProcess) -> None:
    await cluster.until(lambda found: len(found) == N_REPLICAS)
    told = json.loads(await asyncio.to_thread(cluster.run, "status", "--json"))
    assert {one["replica"] for one in told["replicas"]} == {"r1", "r2", "r3"}
    assert {part["status"] for part in told["parts"]} == {"RUNNING"}


def test_a_second_local_cluster_says_that_there_is_one(cluster: ClusterProcess, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="a local cluster is up already"):
        cluster.run("up", "--fake-engine")
