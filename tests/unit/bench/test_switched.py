"""On against off: who goes first, what is on the table, pauses and drafts of those who come back."""

from __future__ import annotations

import math
from itertools import islice
from random import Random
from statistics import median, stdev

import pytest

from pasture.bench.foresight import FORESIGHT, Played
from pasture.bench.foresight import ratios as walls
from pasture.bench.foresight import table as foresight_table
from pasture.bench.measure import figures
from pasture.bench.options import BenchOptions
from pasture.bench.results import Run
from pasture.bench.returning import LONGEST_TYPING_SECONDS, PREFETCH, drafts, first_turns, pauses
from pasture.bench.switched import Side
from pasture.bench.turn_ahead import TURN_AHEAD, Turn, ratios


async def test_sides_alternate_and_take_turns_at_going_first() -> None:
    seen: list[str] = []

    async def once(side: Side) -> Run:
        seen.append(side.label)
        return Run(side.label, side.label, figures(()), ())

    runs = await PREFETCH.alternate(2, once)
    assert seen == ["prefetch off", "prefetch on", "prefetch on", "prefetch off"]
    report = PREFETCH.report("a title", runs, BenchOptions(api_key="secret"))
    assert [summary.label for summary in report.best] == ["prefetch on", "prefetch off"]
    assert [summary.runs for summary in report.best] == [2, 2]
    assert "secret" not in str(report.settings)


@pytest.mark.parametrize("switch", [PREFETCH, TURN_AHEAD, FORESIGHT])
def test_the_two_sides_have_the_same_switches(switch: object) -> None:
    assert isinstance(switch, type(PREFETCH))
    off, on = switch.order(0)
    assert len(off.flags) == len(on.flags)
    assert off.flags != on.flags


def test_pauses_are_log_normal_around_their_median() -> None:
    drawn = [p.think_seconds + p.typing_seconds for p in islice(pauses(Random(1), 10.0, 0.4), 1, 4000)]
    assert median(drawn) == pytest.approx(10.0, rel=0.05)
    assert stdev(map(math.log, drawn)) == pytest.approx(0.4, rel=0.1)
    assert min(drawn) >= 2.0


def test_the_first_pause_began_before() -> None:
    """Somebody who looks at a random moment waits half a pause of the kind that takes longest."""
    firsts = [next(pauses(Random(seed), 10.0, 0.01)) for seed in range(2000)]
    assert sum(p.think_seconds + p.typing_seconds for p in firsts) / len(firsts) == pytest.approx(5.0, rel=0.1)


def test_typing_ends_a_pause_and_does_not_take_for_ever() -> None:
    for pause in islice(pauses(Random(2), 30.0, 1.5), 500):
        assert 0 < pause.typing_seconds <= LONGEST_TYPING_SECONDS
        assert pause.typing_seconds <= pause.think_seconds + 1e-9


def test_drafts_grow_by_words_from_the_first_letter_on_and_sending_is_a_key_too() -> None:
    assert list(drafts("Why not so?", 11.0)) == [(0.0, "W"), (3.0, "Why "), (7.0, "Why not "), (10.0, "Why not so?")]
    assert [draft for _, draft in drafts("a b c d e f g h", 0.6)] == ["a", "a b ", "a b c d ", "a b c d e f "]


def test_sessions_have_nothing_in_common_but_their_first_words() -> None:
    talks = first_turns(BenchOptions(sessions=20, context=200))
    assert len({talk.messages[0]["content"] for talk in talks}) == 20
    assert all(600 < len(talk.messages[0]["content"]) < 1000 for talk in talks)


def test_the_turn_after_reasoning_is_compared_with_itself() -> None:
    turns = [
        Turn("turn-ahead off", 1.0, 400, 230, 20),
        Turn("turn-ahead on", 0.2, 400, 25, 20),
        Turn("turn-ahead on", 0.4, 400, 27, 20),
    ]
    assert [turn.beyond_tokens for turn in turns] == [210, 5, 7]
    assert ratios(turns) == pytest.approx({"ttft": 0.3, "computed": 26 / 230})


def test_foresight_is_judged_by_walls_and_by_what_it_takes_of_the_processor() -> None:
    played = [
        Played("team", "foresight off", 10.0, 1.0, 100, 0, 0.0, 20.0),
        Played("team", "foresight on", 11.0, 1.0, 100, 0, 0.5, 20.0),
    ]
    assert walls(played) == pytest.approx({"team": 1.1})
    assert foresight_table(played).row_count == 1
    assert played[1].own_share == 0.025
