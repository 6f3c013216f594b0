"""When the live cache is written smaller, and when it goes back."""

from __future__ import annotations

from pasture.core.values import Form
from pasture.scheduler.shift import AMPLE_SECONDS, BAN_SECONDS, SHORT_SECONDS, TRIAL_SECONDS, Demand, Shifter

SHORT = Demand(short=True, needed_cells=3000)
FULL = Demand(short=False, needed_cells=900)
AMPLE = Demand(short=False, needed_cells=100)


def steps(shifter: Shifter, begin: float, tokens_per_second: int) -> None:
    for i in range(int(TRIAL_SECONDS) + 1):
        shifter.observe(begin + i, 1.0, tokens_per_second)


def shifted(rate_before: int = 100) -> Shifter:
    """Shifted down at 100 s."""
    shifter = Shifter(Form.Q8_0, 1000)
    steps(shifter, 80, rate_before)
    shifter.shifted(Form.Q8_0, 100)
    return shifter


def test_a_pool_that_stays_short_is_shifted_down() -> None:
    shifter = Shifter(Form.Q8_0, 1000)
    assert shifter.advise(Form.RAW, SHORT, 10) is None
    assert shifter.advise(Form.RAW, SHORT, 10 + SHORT_SECONDS) is Form.Q8_0


def test_a_short_moment_is_not_enough() -> None:
    shifter = Shifter(Form.Q8_0, 1000)
    assert shifter.advise(Form.RAW, SHORT, 10) is None
    assert shifter.advise(Form.RAW, FULL, 11) is None
    assert shifter.advise(Form.RAW, SHORT, 10 + SHORT_SECONDS) is None


def test_without_a_form_nothing_happens() -> None:
    shifter = Shifter(None, 1000)
    assert shifter.advise(Form.RAW, SHORT, 10) is None
    assert shifter.advise(Form.RAW, SHORT, 100) is None


def test_it_goes_back_when_everything_fits_for_a_while() -> None:
    shifter = shifted()
    steps(shifter, 100, 100)
    assert shifter.advise(Form.Q8_0, AMPLE, 120) is None
    assert shifter.advise(Form.Q8_0, FULL, 125) is None
    assert shifter.advise(Form.Q8_0, AMPLE, 130) is None
    assert shifter.advise(Form.Q8_0, AMPLE, 130 + AMPLE_SECONDS) is Form.RAW


def test_a_shift_that_made_things_slower_is_undone_and_not_repeated_soon() -> None:
    shifter = shifted(rate_before=100)
    steps(shifter, 101, 80)
    assert shifter.advise(Form.Q8_0, SHORT, 100 + TRIAL_SECONDS) is Form.RAW
    shifter.shifted(Form.RAW, 120)
    for now in (121, 130, 300):
        assert shifter.advise(Form.RAW, SHORT, now) is None
    assert shifter.advise(Form.RAW, SHORT, 120 + BAN_SECONDS) is Form.Q8_0


def test_a_shift_that_paid_stays() -> None:
    shifter = shifted(rate_before=100)
    steps(shifter, 101, 120)
    assert shifter.advise(Form.Q8_0, SHORT, 100 + TRIAL_SECONDS) is None


def test_a_cache_that_could_not_be_rebuilt_is_left_alone_for_a_while() -> None:
    shifter = Shifter(Form.Q8_0, 1000)
    shifter.advise(Form.RAW, SHORT, 10)
    shifter.refuse(13)
    assert shifter.advise(Form.RAW, SHORT, 20) is None
    assert shifter.advise(Form.RAW, SHORT, 13 + BAN_SECONDS) is None, "short for a while first"
    assert shifter.advise(Form.RAW, SHORT, 13 + BAN_SECONDS + SHORT_SECONDS) is Form.Q8_0


def test_a_way_back_for_which_there_was_no_memory_is_left_alone_for_a_while() -> None:
    shifter = shifted()
    steps(shifter, 100, 100)
    shifter.advise(Form.Q8_0, AMPLE, 120)
    assert shifter.advise(Form.Q8_0, AMPLE, 120 + AMPLE_SECONDS) is Form.RAW
    shifter.refuse(141)
    for now in (142, 200, 141 + BAN_SECONDS):
        assert shifter.advise(Form.Q8_0, AMPLE, now) is None
    assert shifter.advise(Form.Q8_0, AMPLE, 141 + BAN_SECONDS + AMPLE_SECONDS) is Form.RAW


def test_a_shift_that_did_not_pay_but_could_not_be_undone_is_undone_later() -> None:
    shifter = shifted(rate_before=100)
    steps(shifter, 101, 80)
    assert shifter.advise(Form.Q8_0, AMPLE, 100 + TRIAL_SECONDS) is Form.RAW  # and what ran did not fit
    shifter.advise(Form.Q8_0, AMPLE, 120)
    assert shifter.advise(Form.Q8_0, AMPLE, 120 + AMPLE_SECONDS) is Form.RAW
