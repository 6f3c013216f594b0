"""A service over replicas behind real sockets: streams that survive, sessions that stay, replicas that come and go."""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from collections import Counter
from contextlib import aclosing
from dataclasses import replace
from functools import partial

import pytest

from pasture.cluster import frames, messages
from pasture.cluster.forest import number_of, origin
from pasture.cluster.link import Link
from pasture.cluster.service import ClusterService, ClusterSettings
from pasture.cluster.values import ReplicaId
from pasture.core.errors import NoReplica, PromptTooLong, RequestError
from pasture.core.values import (
    DEFAULT_NAMESPACE,
    Allowance,
    Constraint,
    ConstraintKind,
    FinishReason,
    Namespace,
    Request,
    RequestId,
    SamplingParams,
    Whereabouts,
)
from pasture.engine.fake import END_TOKEN, expected_reply
from pasture.scheduler.scheduler import Scheduler
from tests.cluster_support import GREEDY, KEY, Fleet, TiringEngine, collect, fleet, request, until, usual

PROMPT = tuple(i % 250 for i in range(200))
SEEDED = SamplingParams(seed=5)


async def serving(made: Fleet) -> str:
    """Which replica the one request runs on."""

    def busy() -> list[str]:
        return [name for name, replica in made.replicas.items() if replica.service.statistics().scheduler.decoding]

    await until(busy)
    return busy()[0]


async def test_a_reply_is_what_one_machine_would_have_answered() -> None:
    async with fleet() as made:
        tokens, finish = await collect(made.service, request("a", PROMPT, 20))
        assert tokens == expected_reply(PROMPT, 20, GREEDY)
        assert (finish.usage.prompt_tokens, finish.usage.completion_tokens) == (200, 20)


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
async def test_a_stream_goes_on_when_its_replica_dies(params: SamplingParams) -> None:
    async with fleet(TiringEngine(45), TiringEngine(45), TiringEngine(45)) as made:
        tokens: list[int] = []
        died: list[str] = []
        usages = []
        async with aclosing(made.service.generate(request("a", PROMPT, 120, params))) as events:
            async for event in events:
                if event.token is not None:
                    tokens.append(event.token)
                if event.usage is not None:
                    usages.append(event.usage)
                if len(tokens) in (30, 70) and len(died) < 2:
                    died.append(await serving(made))
                    await made.replicas[died[-1]].die()
                    if len(died) == 2:
                        made.rest()
        assert len(set(died)) == 2
        assert tokens == expected_reply(PROMPT, 120, params)
        assert event.finish is not None
        assert event.finish.reason is FinishReason.LENGTH
        usage = event.finish.usage
        assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (200, 0, 120)
        assert len(usages) == 1, "the first token's cost is told once"
        assert made.service.survived == 2
        assert len(made.service.router.replicas()) == 1


async def test_a_bound_reply_goes_on_in_its_form_when_its_replica_dies() -> None:
    form = Constraint(ConstraintKind.REGEX, "([a-z]{5} ){12}", "guided_regex")
    params, ends = SamplingParams(seed=5, constraint=form), frozenset({END_TOKEN})
    async with fleet(TiringEngine(40), TiringEngine(40)) as made:
        tokens: list[int] = []
        asked = replace(request("a", PROMPT, 120, params), stop_tokens=ends)
        async with aclosing(made.service.generate(asked)) as events:
            async for event in events:
                if event.token is not None:
                    tokens.append(event.token)
                if len(tokens) == 20 and len(made.service.router.replicas()) == 2:
                    await made.replicas[await serving(made)].die()
                    await made.settled(1)
                    made.rest()
        assert event.finish is not None
        assert event.finish.reason is FinishReason.STOP
        assert tokens == expected_reply(PROMPT, 120, params, ends)
        bad = replace(params, constraint=replace(form, text="("))
        with pytest.raises(RequestError, match="unclosed") as caught:
            await collect(made.service, replace(request("b", PROMPT, 8, bad), stop_tokens=ends))
        assert caught.value.param == "guided_regex"


async def test_a_replica_that_is_only_closed_loses_nobody_either() -> None:
    async with fleet(TiringEngine(20), TiringEngine(20)) as made:
        asking = asyncio.create_task(collect(made.service, request("a", PROMPT, 60)))
        name = await serving(made)
        await asyncio.to_thread(made.replicas[name].service.close)
        made.rest()
        tokens, _ = await asking
        assert tokens == expected_reply(PROMPT, 60, GREEDY)
        assert made.service.survived == 1


async def test_without_any_replica_the_answer_is_503_and_says_so() -> None:
    async with fleet(usual(), settings=ClusterSettings(patience_seconds=0.2)) as made:
        await made.replicas["r0"].die()
        await made.settled(0)
        assert not made.service.ready
        with pytest.raises(NoReplica, match="try again"):
            await collect(made.service, request("a", PROMPT))


async def test_a_request_waits_for_a_replica_that_comes_back() -> None:
    async with fleet(TiringEngine(20)) as made:
        asking = asyncio.create_task(collect(made.service, request("a", PROMPT, 60)))
        await serving(made)
        await made.replicas["r0"].die()
        await made.settled(0)
        await made.restart("r0", usual())
        tokens, _ = await asking
        assert tokens == expected_reply(PROMPT, 60, GREEDY)
        assert made.service.survived == 1


async def test_nothing_is_credited_to_the_dead() -> None:
    async with fleet() as made:
        await collect(made.service, request("a", PROMPT, 4))
        await until(lambda: made.service.router.statistics().known_blocks)
        for name in ("r0", "r1"):
            await made.replicas[name].die()
        await made.settled(0)
        assert made.service.router.statistics().known_blocks == 0
        await made.restart("r0", usual())
        await made.settled(1)
        _, finish = await collect(made.service, request("b", PROMPT, 4))
        assert finish.usage.cached_tokens == 0


async def test_the_requests_own_faults_are_the_clients() -> None:
    async with fleet() as made:
        for asked, fault in ((request("a", ()), RequestError), (request("b", PROMPT, 9000), PromptTooLong)):
            with pytest.raises(fault):
                await collect(made.service, asked)
        assert made.service.survived == 0


async def test_what_its_client_leaves_is_ended_on_the_replica() -> None:
    async with fleet(TiringEngine(20)) as made:
        async with aclosing(made.service.generate(request("a", PROMPT, 5000))) as events:
            async for event in events:
                if event.token is not None:
                    break
        await until(lambda: not made.replicas["r0"].service.statistics().scheduler.decoding)


async def test_turns_of_a_conversation_stay_together_without_a_session() -> None:
    async with fleet(usual(), usual(), usual()) as made:
        said = list(PROMPT)
        for turn in range(4):
            tokens, finish = await collect(made.service, request(f"t{turn}", said, 70))
            if turn:
                assert finish.usage.cached_tokens == len(said) - 8 - 1, "all of the old tokens but the last"
            said += [*tokens, *range(8)]
        assert sum(bool(replica.engine.n_computed) for replica in made.replicas.values()) == 1


async def test_a_drained_replica_hands_its_conversations_over() -> None:
    async with fleet() as made:
        said: dict[int, list[int]] = {}
        for n in range(20):
            prompt = [n, n + 1, *PROMPT[: 60 + 7 * n]]
            reply, _ = await collect(made.service, request(f"c{n}", prompt, 9))
            said[n] = prompt + reply
        drained = made.replicas["r0"]
        await made.register.drain(drained.member.replica)
        await made.settled(1)
        link = made.service.links.open[drained.member.replica]
        told = await link.hand_over([made.replicas["r1"].member])
        assert told["carried"] == told["conversations"]
        assert told["carried"] == len(drained.server.conversations)
        await drained.die()
        for n, tokens in said.items():
            _, finish = await collect(made.service, request(f"d{n}", [*tokens, 3, 4], 2))
            assert finish.usage.cached_tokens >= len(tokens) - 1


async def test_a_session_moves_without_recomputation() -> None:
    async with fleet() as made:
        asked = Request(RequestId("a"), PROMPT, 40, GREEDY, session="s")
        reply, _ = await collect(made.service, asked)
        here = next(name for name, replica in made.replicas.items() if replica.engine.n_computed)
        there = "r1" if here == "r0" else "r0"
        tokens = [*PROMPT, *reply]
        assert await made.service.move(DEFAULT_NAMESPACE, tokens, ["s"], there) == len(tokens) - 1
        before = made.replicas[there].engine.n_computed
        _, finish = await collect(made.service, Request(RequestId("b"), (*tokens, 1, 2), 4, GREEDY, session="s"))
        assert finish.usage.cached_tokens == len(tokens) - 1
        assert made.replicas[there].engine.n_computed > before


async def test_statistics_are_those_of_all() -> None:
    async with fleet() as made:
        for n in range(6):
            await collect(made.service, request(f"a{n}", (n, *PROMPT), 4))
        await until(lambda: made.service.statistics().scheduler.submitted_total == 6)
        found = made.service.statistics()
        assert found.pool.shape.n_cells == 2 * 8192
        ids = [sequence.sequence for sequence in found.pool.sequences]
        assert len(ids) == len(set(ids))


async def test_every_ingress_shows_the_prefixes_of_all_and_opens_one_where_it_lives() -> None:
    async with fleet() as made:
        other = made.another_ingress()
        other.start()
        await until(lambda: len(other.router.replicas()) == 2)
        shared, salt = PROMPT[:120], Namespace("salt")
        for replica, first in zip(made.replicas.values(), (1, 2), strict=True):
            for n in (3, 4):  # each has a tree: what two hold, and two that go on from there
                asked = replace(request(f"{first} {n}", (first, *shared, n, *range(30))), namespace=salt)
                await collect(replica.service, asked)
        await until(lambda: len(made.service.statistics().pool.prefixes) == 6)
        await until(lambda: len(other.statistics().pool.prefixes) == 6)
        pool = made.service.statistics().pool
        assert Counter(prefix.replica for prefix in pool.prefixes) == {"r0": 3, "r1": 3}
        assert not any(prefix.tokens for prefix in pool.prefixes), "what people wrote stays where it is"
        assert {sequence.prefix for sequence in pool.sequences} == {p.number for p in pool.prefixes if p.parent is not None}
        for prefix in pool.prefixes:
            here = made.replicas[str(prefix.replica)].service
            alone = await here.open_prefix(origin(prefix.number)[0], 9)
            assert alone is not None
            assert (alone.n_tokens, len(alone.tokens)) == (prefix.n_tokens, 9)
            assert await made.service.open_prefix(prefix.number, 9) == alone
            assert await other.open_prefix(prefix.number, 9) == alone
        roots = {prefix.replica: prefix.number for prefix in pool.prefixes if prefix.parent is None}
        opened = [await made.service.open_prefix(roots[name], 2) for name in ("r0", "r1")]
        assert [content and content.tokens for content in opened] == [(1, 0), (2, 0)]
        other.close()
        await asyncio.sleep(0)


async def test_a_prefix_whose_replica_has_left_is_gone() -> None:
    async with fleet() as made:
        await collect(made.replicas["r0"].service, request("a", PROMPT))
        await until(lambda: made.service.statistics().pool.prefixes)
        (prefix,) = made.service.statistics().pool.prefixes
        assert await made.service.open_prefix(prefix.number, 9) is not None
        assert await made.service.open_prefix(prefix.number + number_of(1000, 0), 9) is None, "it never had that one"
        await asyncio.to_thread(made.replicas["r0"].service.close)
        assert await made.service.open_prefix(prefix.number, 9) is None, "it is just leaving"
        await made.replicas["r0"].die()
        await made.settled(1)
        assert made.service.statistics().pool.prefixes == ()
        assert await made.service.open_prefix(prefix.number, 9) is None
        await made.restart("r0", usual())
        await made.settled(2)
        await collect(made.replicas["r0"].service, request("b", PROMPT[::-1]))
        await until(lambda: made.service.statistics().pool.prefixes)
        (later,) = made.service.statistics().pool.prefixes
        (own, _), (_, mark) = origin(later.number), origin(prefix.number)
        assert await made.service.open_prefix(number_of(own, mark), 9) is None, "what a later start calls so is another"


@pytest.mark.parametrize("greeting", [frames.GREETING, b"pasture cluster 0\n"], ids=["no key", "another version"])
async def test_strangers_are_not_heard(greeting: bytes) -> None:
    async with fleet() as made:
        port = made.replicas["r0"].member.port
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(greeting + bytes(64))
        heard = b""
        with contextlib.suppress(ConnectionError):
            while part := await reader.read(1 << 16):
                heard += part
        assert len(heard) <= 18 + 32 + 32, "a challenge and an answer, and no frame"
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@pytest.mark.parametrize("body", [b"", b"\xc1", messages.encode(messages.Done(1))], ids=["nothing", "noise", "an answer"])
async def test_a_frame_that_nobody_understands_ends_its_connection_and_no_other(
    body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with fleet() as made:
        member = made.replicas["r0"].member
        wire = await frames.connect(member.host, member.port, KEY)
        wire.write(len(body).to_bytes(4, "little") + bytes(8) + body)
        assert isinstance((await wire.receive())[0], messages.Hello)
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(wire.receive(), 10)
        wire.close()
        assert "a frame that nobody understands" in caplog.text
        await collect(made.service, request("a", PROMPT, 4))
        assert len(made.service.links.open) == 2


async def test_a_replica_that_says_nothing_is_lost_unless_bytes_keep_coming(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pasture.cluster.link.SILENCE_SECONDS", 1.0)
    ends: list[frames.Wire[messages.ToReplica]] = []
    server = await frames.serve("127.0.0.1", 0, KEY, ends.append)
    async with fleet(usual()) as made:
        identity = made.replicas["r0"].server.identity
    wires = [await frames.connect("127.0.0.1", server.sockets[0].getsockname()[1], KEY) for _ in range(2)]
    await until(lambda: len(ends) == 2)
    silent, slow = (Link(wire, made.replicas["r0"].member, identity, lambda *_: None) for wire in wires)
    body = messages.encode(messages.Done(1))
    ends[1].write(len(body).to_bytes(4, "little") + (1 << 20).to_bytes(8, "little") + body)
    for _ in range(30):
        ends[1].write(b"part of what is behind the frame")
        await asyncio.sleep(0.1)
    assert silent.closed.is_set()
    assert not slow.closed.is_set()
    slow.close()
    server.close()


async def test_locate_pin_and_release() -> None:
    async with fleet() as made:
        await collect(made.service, request("a", PROMPT, 4))
        found = await made.service.locate(DEFAULT_NAMESPACE, PROMPT)
        assert max(found.live_tokens, found.ram_tokens) >= len(PROMPT) - 1
        pin = await made.service.pin(DEFAULT_NAMESPACE, PROMPT)
        pinned = [r.service.statistics().store.tiers[0].pinned_bytes for r in made.replicas.values()]
        assert any(pinned)
        pin.release()
        pin.release()
        await until(lambda: not any(r.service.statistics().store.tiers[0].pinned_bytes for r in made.replicas.values()))


async def test_of_what_only_disks_have_the_replica_with_most_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    async with fleet(usual(), usual()) as made:
        for name, on_disk in (("r0", 5), ("r1", 70)):

            async def locate(*_: object, found: int = on_disk, **__: object) -> Whereabouts:
                return Whereabouts(0, 0, 0, {"disk": found})

            monkeypatch.setattr(made.replicas[name].service, "locate", locate)
        assert (await made.service.locate(DEFAULT_NAMESPACE, PROMPT, deep=True)).slow_tokens == {"disk": 70}


async def test_an_export_of_the_cluster_is_one_of_a_replica() -> None:
    async with fleet() as made:
        await collect(made.service, request("a", PROMPT, 4))
        exported = await made.service.export(DEFAULT_NAMESPACE, PROMPT)
        replica = next(r for r in made.replicas.values() if not r.engine.n_computed)
        assert await replica.service.restore(DEFAULT_NAMESPACE, array("i", PROMPT), exported) == len(PROMPT)
        assert ReplicaId("r0") in made.service.links.open


def heard(service: ClusterService, tokens: list[int]) -> bool:
    """Whether an ingress knows a conversation that stands at these tokens."""
    path = service._path(DEFAULT_NAMESPACE, tokens)
    return not service._continuing.session(path, RequestId("asked")).endswith("asked")


async def test_every_replica_hears_what_a_namespace_may_hold() -> None:
    async with fleet() as made:
        made.service.allow(DEFAULT_NAMESPACE, Allowance(live_cells=7))

        def limits(scheduler: Scheduler) -> int | None:
            return scheduler.pool.evictor.shares.limit(DEFAULT_NAMESPACE)

        for replica in made.replicas.values():
            while await replica.service._ask(limits) != 7:
                pass


async def test_every_replica_hears_how_long_kv_is_kept() -> None:
    async with fleet() as made:
        await asyncio.to_thread(made.service.keep_for, {DEFAULT_NAMESPACE: 0.0})

        def due(scheduler: Scheduler) -> float | None:
            return scheduler.resting.expires_in()

        await made.replicas["r1"].die()
        await made.settled(1)
        await made.restart("r1", usual())  # who comes later hears it too
        await made.settled(2)
        for name, replica in enumerate(made.replicas.values()):
            await collect(replica.service, request(f"a{name}", PROMPT, 4))
            while await replica.service._ask(due) is not None:
                pass
            assert await replica.service._ask(lambda scheduler: scheduler.pool.evicted_cells["expired"]) == len(PROMPT) + 3


async def test_ingresses_agree_on_where_a_conversation_is() -> None:
    async with fleet(usual(), usual(), usual()) as made:
        other = made.another_ingress()
        other.start()
        await until(lambda: len(other.router.replicas()) == 3)
        said, turns = list(PROMPT), [made.service, other, made.service, other]
        for turn, service in enumerate(turns):
            reply, finish = await collect(service, request(f"t{turn}", said, 70))
            if turn:
                assert finish.usage.cached_tokens == len(said) - 8 - 1
            said += [*reply, *range(8)]
            await until(partial(heard, turns[(turn + 1) % 4], said[: len(said) - 8]))
        assert sum(bool(replica.engine.n_computed) for replica in made.replicas.values()) == 1
        other.close()
        await asyncio.sleep(0)
