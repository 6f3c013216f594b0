"""The cost gate: what was measured decides, and what was not is assumed kindly."""

from __future__ import annotations

import math

import pytest

from pasture.core.values import Direction, Form, Transfer
from pasture.tiers.gate import MOST_TRIED_SECONDS, STALE_DESCRIPTIONS, TRIED_SHARE, CostGate, OpenGate, Rate

CELL = 23_040
RAW = {Form.RAW: 1000 * CELL}


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


def transfer(direction: Direction, bytes_per_second: float, n_tokens: int = 1000) -> Transfer:
    return Transfer(direction, n_tokens, n_tokens * CELL, n_tokens * CELL / bytes_per_second)


def test_on_ordinary_hardware_everything_is_open_before_it_is_measured() -> None:
    gate = CostGate(CELL)
    assert gate.fetch(1000, RAW)
    assert gate.spill(1000)
    assert gate.fetch_slow("disk", 1000)
    assert gate.spill_slow("disk", 64, 64 * CELL)
    assert not gate.figures().refusals


def test_the_optimism_is_bounded(time: Time) -> None:
    gate = CostGate(CELL, clock=time)
    gate.observe_prefill(1e8)
    assert not gate.fetch(1000, RAW)
    assert not gate.spill(1000)
    assert not gate.fetch_slow("disk", 1000)
    assert not gate.spill_slow("disk", 64, 64 * CELL)
    assert gate.figures().refusals == {"fetch": 2, "spill": 2}


def test_a_spill_can_be_ruled_out_before_it_is_known_how_much_of_it_is_missing(time: Time) -> None:
    gate = CostGate(CELL, clock=time)
    assert not gate.refuses_spill(1000)
    gate.observe_prefill(1e8)
    assert gate.refuses_spill(1000)
    assert gate.figures().refusals == {"spill": 1}
    time.now = 100.0
    assert not gate.refuses_spill(1000), "one may be tried again"
    assert gate.spill(1000), "for asking was no try yet"
    assert gate.refuses_spill(1000)
    assert not OpenGate(CELL).refuses_spill(1000)


def test_the_price_of_a_fetch_is_the_fastest_tiers_against_computing() -> None:
    gate = CostGate(CELL)
    gate.observe_prefill(1000)
    assert gate.fetch_price([]) == math.inf
    gate.describe_tier("disk", 0.001, CELL * 10_000)
    gate.describe_tier("redis", 0.001, CELL * 100)
    assert gate.fetch_price(["redis", "disk"]) == pytest.approx(0.1, rel=0.02)
    assert gate.fetch_price(["redis"]) == pytest.approx(10, rel=0.02)
    gate.observe_prefill(10_000)
    assert gate.fetch_price(["disk"]) == pytest.approx(1, rel=0.02)


def test_slow_restores_close_the_gate(time: Time) -> None:
    gate = CostGate(CELL, clock=time)
    gate.observe_prefill(5000)  # 1,000 tokens in 0.2 s
    assert gate.fetch(1000, RAW)
    for _ in range(20):
        gate.observe([transfer(Direction.RESTORE, 50e6)])  # 23 MB in 0.46 s
    assert not gate.fetch(1000, RAW)
    assert not gate.spill(1000)
    assert not gate.fetch_slow("disk", 1000)
    assert not gate.spill_slow("disk", 1000, 1000 * CELL)
    assert gate.figures().restore_bytes_per_second == pytest.approx(50e6, rel=0.2)


@pytest.mark.parametrize("direction", list(Direction))
def test_one_slow_moment_closes_the_gate_for_a_moment(time: Time, direction: Direction) -> None:
    """Nothing is measured here but what the gate has let through, as in a server."""
    gate = CostGate(CELL, clock=time)
    gate.observe_prefill(20_000)  # 1,000 tokens in 50 ms
    speeds = {Direction.SAVE: 10e9, Direction.RESTORE: 10e9}
    gate.observe([transfer(way, speed, 64) for way, speed in speeds.items()])  # the rehearsal
    gate.observe([transfer(direction, 0.1e9)])
    closed_at = [gate.spill(1000), gate.fetch(1000, RAW)].index(False)
    for time.now in range(120):
        if gate.spill(1000):
            gate.observe([transfer(Direction.SAVE, speeds[Direction.SAVE])])
        if gate.fetch(1000, RAW):
            gate.observe([transfer(Direction.RESTORE, speeds[Direction.RESTORE])])
    assert gate.figures().refusals[("spill", "fetch")[closed_at]] > 1
    assert gate.saving_of_spill(1000) > 0
    assert gate.saving_of_fetch(1000, RAW) > 0


def test_trying_costs_a_small_share_where_transfers_do_lose(time: Time) -> None:
    gate = CostGate(CELL, clock=time)
    gate.observe_prefill(100_000)  # 1,000 tokens in 10 ms
    lost = 0.0
    for tick in range(60_000):
        time.now = 0.01 * tick
        for direction, is_let_through in ((Direction.SAVE, gate.spill(1000)), (Direction.RESTORE, gate.fetch(1000, RAW))):
            if is_let_through:
                moved = transfer(direction, 0.5e9)
                gate.observe([moved])
                lost += moved.seconds
    assert gate.figures().restore_bytes_per_second == pytest.approx(0.5e9, rel=0.01)
    assert 0 < lost < 1.5 * 2 * TRIED_SHARE * time.now


def test_however_long_ago_it_was_nobody_waits_long_for_a_try(time: Time) -> None:
    gate = CostGate(CELL, clock=time)
    gate.observe([transfer(Direction.RESTORE, 1e6, 10_000)])
    time.now = 1e9
    assert not gate.fetch(1000, RAW), "which would have taken about 20 s"
    assert -gate.saving_of_fetch(50, RAW) < MOST_TRIED_SECONDS
    assert gate.fetch(50, RAW)
    assert not gate.fetch(50, RAW)


def test_what_lies_on_a_slow_tier_alone_is_tried_too(time: Time) -> None:
    gate = CostGate(CELL, clock=time)
    gate.observe_prefill(20_000)
    gate.observe([transfer(Direction.RESTORE, 0.1e9)])
    assert not gate.fetch_slow("disk", 1000)
    time.now = 100.0
    assert not gate.spill_slow("disk", 1000, 1000 * CELL), "no write tells how fast restoring is"
    assert gate.fetch_slow("disk", 1000)
    assert not gate.fetch_slow("disk", 1000)
    assert gate.fetch(1000, {}), "what came up is restored as well, though another try was just made"


def test_saving_must_pay_for_what_may_never_return() -> None:
    certain, doubtful = CostGate(CELL, return_probability=1.0), CostGate(CELL, return_probability=0.1)
    for gate in (certain, doubtful):
        gate.observe_prefill(20_000)  # 50 ms
        for _ in range(30):
            gate.observe([transfer(Direction.SAVE, 1e9), transfer(Direction.RESTORE, 2e9)])  # 23 and 12 ms
    assert certain.spill(1000)
    assert not doubtful.spill(1000)
    assert certain.saving_of_spill(1000) == pytest.approx(0.05 - 0.023 - 0.0115, abs=0.004)


def test_small_transfers_do_not_pass_for_slow_ones() -> None:
    rate = Rate(1e9)
    rate.observe(100e6, 0.1)
    for _ in range(3):
        rate.observe(1e3, 1e-4)  # 10 MB/s, of a kilobyte
    assert rate.per_second == pytest.approx(1e9, rel=0.02)
    rate.observe(0, 5)
    rate.observe(5, 0)
    assert rate.per_second == pytest.approx(1e9, rel=0.02)


def test_undoing_a_form_counts() -> None:
    gate = CostGate(CELL)
    gate.observe_prefill(10_000)
    squeezed = {Form.Q8_0: 1000 * CELL // 2}
    assert gate.fetch(1000, squeezed)
    for _ in range(20):
        gate.observe_unpack(Form.Q8_0, CELL * 500, 0.2)
    assert not gate.fetch(1000, squeezed)
    assert gate.fetch(1000, RAW)


def test_each_tier_is_judged_by_its_own_figures() -> None:
    gate = CostGate(CELL)
    gate.observe_prefill(2000)  # 0.5 s
    gate.describe_tier("far", latency_seconds=0.6, bytes_per_second=0.0)
    gate.describe_tier("thin", latency_seconds=0.0, bytes_per_second=10e6)
    assert not gate.fetch_slow("far", 1000)
    assert not gate.fetch_slow("thin", 1000)
    assert gate.fetch_slow("far", 4000)
    assert gate.fetch_slow("disk", 1000)
    for _ in range(40):
        gate.observe_read("thin", 10**6, 1e-3)
    gate.describe_tier("thin", latency_seconds=0.0, bytes_per_second=10e6)
    assert gate.fetch_slow("thin", 1000)


def test_a_tier_that_was_slow_once_is_given_another_chance() -> None:
    gate = CostGate(CELL)
    gate.observe_prefill(2000)
    gate.describe_tier("far", latency_seconds=1e-3, bytes_per_second=1e9)
    assert gate.fetch_slow("far", 1000)
    for _ in range(40):
        gate.observe_read("far", 10**6, 10.0)
    for _ in range(STALE_DESCRIPTIONS):
        gate.describe_tier("far", latency_seconds=1e-3, bytes_per_second=1e9)
        assert not gate.fetch_slow("far", 1000), "what was measured lately counts"
    gate.describe_tier("far", latency_seconds=1e-3, bytes_per_second=1e9)
    assert gate.fetch_slow("far", 1000)


def test_the_size_of_a_token_is_learnt() -> None:
    gate = CostGate()
    for _ in range(60):
        gate.observe([transfer(Direction.SAVE, 1e9)])
    assert gate.stored_bytes(1000) == pytest.approx(1000 * CELL, rel=0.02)


def test_an_open_gate_measures_and_refuses_nothing() -> None:
    gate = OpenGate(CELL)
    gate.observe_prefill(1e9)
    gate.observe([transfer(Direction.SAVE, 1e6)])
    assert gate.fetch(1, RAW)
    assert gate.spill(1)
    assert gate.figures().prefill_tokens_per_second == 1e9
    assert not gate.figures().refusals
