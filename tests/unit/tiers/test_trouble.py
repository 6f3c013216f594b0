"""Leaving a failing device alone, warning once, and expecting of it what it lately did."""

from __future__ import annotations

import logging

import pytest

from pasture.tiers.pace import HALF_LIFE_SECONDS, SMALL_BYTES, Pace, Speed
from pasture.tiers.trouble import (
    FIRST_PAUSE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    QUIET_SECONDS,
    Breaker,
    BreakerState,
    Circuit,
    Complaints,
)


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_a_circuit_opens_for_longer_and_longer() -> None:
    clock = Clock()
    circuit = Circuit(clock)
    pause = FIRST_PAUSE_SECONDS
    for _ in range(10):
        assert circuit.allows
        circuit.failed()
        circuit.failed()
        assert not circuit.allows, "at once"
        clock.seconds += pause - 0.01
        assert not circuit.allows, "until the pause is over; a failure within it counts for nothing"
        clock.seconds += 0.02
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
    assert pause == LONGEST_PAUSE_SECONDS
    circuit.succeeded()
    circuit.failed()
    clock.seconds += FIRST_PAUSE_SECONDS
    assert circuit.allows, "a success makes it forget"


def breaker(clock: Clock) -> Breaker:
    """One that a probe has closed."""
    breaker = Breaker(clock, tolerated=1, first_pause=1.0, longest_pause=3.0)
    assert not breaker.closed, "nothing is known of it yet"
    assert breaker.probe()
    breaker.succeeded()
    assert breaker.closed
    return breaker


def test_a_breaker_tolerates_one_late_answer_and_no_refusal() -> None:
    for surely, n_failures in ((False, 2), (True, 1)):
        it = breaker(Clock())
        for _ in range(n_failures):
            assert it.closed
            it.failed(surely=surely)
        assert it.state is BreakerState.OPEN
        assert (it.openings, it.failures) == (1, n_failures)
    it = breaker(Clock())
    for _ in range(5):
        it.failed(surely=False)
        it.succeeded()
    assert it.closed, "not in a row"


def test_a_breaker_closes_by_a_probe_alone_and_probes_more_and_more_rarely() -> None:
    clock = Clock()
    it = breaker(clock)
    it.failed(surely=True)
    it.succeeded()
    assert not it.closed, "what was asked before it opened proves nothing"
    for pause in (1.0, 2.0, 3.0, 3.0):
        clock.seconds += pause - 0.01
        assert not it.probe()
        clock.seconds += 0.02
        assert it.probe()
        assert it.state.value == "half-open"
        assert not it.probe(), "one at a time"
        it.failed(surely=False)
        assert it.state.value == "open"
    clock.seconds += 3.01
    assert it.probe()
    it.succeeded()
    assert it.closed
    assert it.openings == 1
    it.failed(surely=True)
    clock.seconds += 1.01
    assert it.probe(), "the pauses begin anew"


def test_complaints_are_made_once_a_kind_and_minute(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    complaints = Complaints(logging.getLogger("test"), clock)
    for kind in ("read", "write", "read", "read"):
        complaints.about(kind, f"cannot {kind}")
    assert caplog.messages == ["cannot read", "cannot write"]
    clock.seconds += QUIET_SECONDS
    complaints.about("read", "cannot read")
    complaints.about("write", "cannot write")
    assert caplog.messages[2:] == ["cannot read (and 2 more like this)", "cannot write"]


def test_pace_follows_reads_of_each_kind() -> None:
    pace = Pace(Speed(1e-4, 1e9), Clock())
    for _ in range(50):
        pace.observe(SMALL_BYTES, 2e-3)
    assert pace.speed.latency_seconds == pytest.approx(2e-3, rel=0.01)
    assert pace.speed.bytes_per_second == pytest.approx(1e9)
    for _ in range(50):
        pace.observe(10_000_000, 2e-3 + 0.1)
    assert pace.speed.bytes_per_second == pytest.approx(1e8, rel=0.01)
    assert pace.speed.latency_seconds == pytest.approx(2e-3, rel=0.01)


def test_pace_forgets_what_nobody_has_seen_lately() -> None:
    clock = Clock()
    pace = Pace(Speed(1e-4, 1e9), clock)
    for _ in range(50):
        pace.observe(10_000_000, 10.0)
    slow = pace.speed.bytes_per_second
    assert slow < 2e6
    clock.seconds += HALF_LIFE_SECONDS
    assert 1 / pace.speed.bytes_per_second == pytest.approx((1 / slow + 1e-9) / 2)
    clock.seconds += 20 * HALF_LIFE_SECONDS
    assert pace.speed.bytes_per_second > 1e8
    assert pace.speed.latency_seconds == pytest.approx(1e-4)


def test_pace_survives_a_clock_that_stands_still() -> None:
    pace = Pace(Speed(1e-6, 1e12), Clock())
    pace.observe(0, 0.0)
    pace.observe(1 << 30, 0.0)
    assert pace.speed.latency_seconds > 0
    assert pace.speed.bytes_per_second > 0
