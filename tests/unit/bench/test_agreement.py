"""What counts as the same reply of two servers."""

from __future__ import annotations

import pytest

from pasture.bench.agreement import agree, gap, told
from pasture.bench.client import Chat, Drawn, Exchange
from pasture.bench.systems import SystemFailed

CHAT = Chat("Ada", ({"role": "user", "content": "x"},), 2, top_logprobs=2)
FIRST = Drawn("a", -0.1, {"a": -0.1, "b": -3.0})


def reply(*drawn: Drawn) -> Exchange:
    return Exchange(CHAT, 0.0, 2.0, (1.0, 2.0), "".join(each.token for each in drawn), drawn=drawn)


def test_equal_replies_have_no_gap_whatever_their_probabilities() -> None:
    moved = Drawn("a", -0.2, {"a": -0.2, "b": -2.0})
    assert gap(reply(FIRST, FIRST), reply(FIRST, moved)) == 0.0


def test_a_gap_is_the_larger_view_of_the_first_difference() -> None:
    mine = Drawn("c", -1.0, {"c": -1.0, "d": -1.05})
    theirs = Drawn("d", -0.9, {"d": -0.9, "c": -1.1})
    later = Drawn("z", -0.1, {"z": -0.1, "y": -9.0})
    assert gap(reply(FIRST, mine, later), reply(FIRST, theirs, FIRST)) == pytest.approx(0.2)


def test_a_token_that_the_other_side_does_not_tell_counts_as_its_least_likely() -> None:
    theirs = Drawn("q", -0.5, {"q": -0.5, "r": -1.0})
    assert gap(reply(FIRST), reply(theirs)) == pytest.approx(2.9)


def test_replies_of_unequal_length_or_without_probabilities_cannot_be_compared() -> None:
    with pytest.raises(SystemFailed, match="1 and 2 tokens"):
        gap(reply(FIRST), reply(FIRST, FIRST))
    with pytest.raises(SystemFailed, match="0 and 0 tokens"):
        gap(reply(), reply())


def test_a_tie_agrees_and_anything_else_does_not() -> None:
    assert agree([0.0, 0.1])
    assert not agree([0.0, 1.0])
    assert not agree([])
    assert told([0.0, 0.0]) == "2 of 2"
    assert told([0.0, 0.125, 0.5]) == "1 of 3, others at 0.50 nats"
