"""The benchmark of idle conversations, whole, on the fake engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from pasture.bench.idle import (
    N_COMPUTED,
    N_TOKENS,
    SHARED_TOKENS,
    FormCost,
    Resting,
    Resumed,
    compute,
    decode_gaps,
    expected_blocks,
    form_costs,
    rest,
    resume,
)
from pasture.core.errors import EngineError
from pasture.core.values import Form, PoolShape
from pasture.engine.fake import FakeEngine
from pasture.scheduler.service import LocalService
from pasture.tiers.compression import Compression, deflate
from pasture.tiers.store import TieredStore, open_store

CONVERSATIONS = 12


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(PoolShape(4096, 16))


@pytest.fixture
def resting(engine: FakeEngine) -> Resting:
    """The gate is told of a slow model: the fake engine is so fast that nothing would be worth keeping."""
    return replace(compute(engine, seed=1), prefill_tokens_per_second=100.0)


@pytest.fixture
def store(engine: FakeEngine) -> Iterator[TieredStore]:
    store = open_store(engine.codec, 64 << 20, divisible=True, cell_bytes=64, compression=Compression.Q8_0)
    yield store
    store.close()


def test_computed_conversations_part_where_they_should_and_leave_nothing(engine: FakeEngine, resting: Resting) -> None:
    assert engine.used_cells == 0
    assert len(resting.tokens) == N_COMPUTED
    for tokens, slab in zip(resting.tokens, resting.slabs, strict=True):
        assert (len(tokens), slab.p0, slab.p1) == (N_TOKENS, 0, N_TOKENS)
        assert tokens[:SHARED_TOKENS] == resting.tokens[0][:SHARED_TOKENS]


def test_copies_have_tokens_of_their_own(resting: Resting) -> None:
    beginnings = {resting.nth(index)[0][: SHARED_TOKENS + 2].tobytes() for index in range(N_COMPUTED, 3000)}
    assert len(beginnings) == 3000 - N_COMPUTED
    assert resting.nth(0)[0] == resting.tokens[0], "what was computed is what it was"


def test_what_rests_is_there_once_and_squeezed(store: TieredStore, resting: Resting) -> None:
    done: list[int] = []
    rest(store, resting, CONVERSATIONS, True, done.append, 30)
    assert done == list(range(1, CONVERSATIONS + 1))
    ram = store.statistics().tiers[0]
    assert ram.blocks == expected_blocks(CONVERSATIONS) == CONVERSATIONS * 7 + 9
    assert set(ram.bytes_by_form) == {Form.Q8_0}


def test_what_is_not_kept_is_an_error(store: TieredStore, resting: Resting) -> None:
    with pytest.raises(EngineError, match="computing it again is cheaper"):
        rest(store, replace(resting, prefill_tokens_per_second=1e9), CONVERSATIONS, True, lambda _: None, 30)


def test_every_form_has_its_cost(engine: FakeEngine, resting: Resting) -> None:
    costs = {cost.form: cost for cost in form_costs(engine, resting, deflate)}
    assert set(costs) == set(Form)
    assert costs[Form.RAW].own_bytes > costs[Form.Q8_0].own_bytes > costs[Form.Q4_0].own_bytes
    assert all(cost.restore_bytes_per_second > 0 for cost in costs.values())
    assert engine.used_cells == 0


def test_a_conversation_counts_with_its_share_of_what_is_common() -> None:
    cost = FormCost(Form.Q8_0, own_bytes=100, shared_bytes=1000, full_bytes=1000, restore_bytes_per_second=1.0)
    assert cost.per_conversation(10) == 200
    assert cost.times_smaller(10) == 5


def test_old_tokens_computed_again_are_those_that_were_not_found() -> None:
    assert Resumed(0.1, known_tokens=1001, cached_tokens=1000, prompt_tokens=1009).recomputed_tokens == 1
    assert Resumed(0.1, known_tokens=1001, cached_tokens=1003, prompt_tokens=1009).recomputed_tokens == 0


async def test_active_users_decode_and_a_conversation_goes_on(engine: FakeEngine, store: TieredStore, resting: Resting) -> None:
    rest(store, resting, CONVERSATIONS, True, lambda _: None, 30)
    service = LocalService(engine, store)
    try:
        assert await decode_gaps(service, 150, seed=1) > 0
        resumed = await resume(service, resting.tokens[1], seed=1)
    finally:
        service.close()
    assert resumed.ttft_seconds > 0
    assert resumed.recomputed_tokens <= 1
