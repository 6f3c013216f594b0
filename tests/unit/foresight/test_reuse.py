"""The reuse model: conversations are recognised, shared prefixes have rates, and everything is bounded."""

from __future__ import annotations

import pytest

from pasture.core.storage import BlockKey
from pasture.core.values import Kind
from pasture.foresight.reuse import LEFT_BEHIND, ReuseModel


def path(name: str, n_blocks: int, head: str = "") -> list[BlockKey]:
    """`head` (one letter a block) followed by blocks of its own."""
    return [BlockKey(f"head-{letter}".encode()) for letter in head] + [
        BlockKey(f"{name}-{i}".encode()) for i in range(n_blocks)
    ]


def test_a_request_that_goes_on_continues_the_conversation() -> None:
    model = ReuseModel()
    first = model.arrived(path("a", 3), 0.0)
    second = model.arrived(path("a", 5), 30.0)
    third = model.arrived(path("a", 8), 60.0)
    assert [visit.turn for visit in (first, second, third)] == [0, 1, 2]
    assert [visit.wait.over for visit in (first, second, third)] == [True, True, False]


def test_a_common_head_makes_no_conversation_but_has_an_arrival_rate() -> None:
    model = ReuseModel()
    for number in range(20):
        visit = model.arrived(path(f"user{number}", 4, head="s"), number * 10.0)
        assert visit.turn == 0
    head, own = path("user19", 4, head="s")[:2]
    assert model.arrival_rate(head, 200.0) == pytest.approx(0.1, rel=0.85)
    assert model.arrival_rate(own, 200.0) == 0.0
    assert model.rate(head, 200.0) > 3 * model.rate(own, 200.0)
    assert model.probability(head, 200.0, 600.0) > 0.9
    assert model.arrival_rate(head, 10_000.0) < 1e-6, "what nobody asks for any more fades"


def test_a_conversation_returning_to_its_own_blocks_is_no_arrival_of_others() -> None:
    model = ReuseModel()
    for turn in range(10):
        model.arrived(path("a", 3 + turn), turn * 20.0)
    assert model.arrival_rate(path("a", 1)[0], 200.0) == 0.0


def test_what_a_conversation_left_behind_is_worth_little() -> None:
    model = ReuseModel()
    old = [*path("a", 4), BlockKey(b"reply that was edited away")]
    model.arrived(old, 0.0)
    model.arrived(path("a", 6), 50.0)
    model.refresh(60.0)
    assert model.rate(old[-1], 60.0) < 2 * LEFT_BEHIND * model.rate(old[0], 60.0)
    assert model.probability(old[-1], 60.0, 60.0) < model.probability(old[0], 60.0, 60.0) / 5


def test_conversations_that_came_back_before_are_worth_more() -> None:
    model = ReuseModel()
    now = 0.0
    for number in range(300):
        now = number * 10.0
        model.arrived(path(f"once{number}", 4), now)
        regular = number % 10
        model.arrived(path(f"regular{regular}", 3 + number // 10), now + 1)
    model.refresh(now)
    assert model.rate(path("regular9", 1)[0], now + 2) > 3 * model.rate(path("once299", 1)[0], now + 2)
    assert model.probability(path("regular9", 1)[0], now + 2, 200.0) > 0.7
    assert model.probability(path("once299", 1)[0], now + 2, 200.0) < 0.2


def test_a_tool_call_is_expected_back_sooner_than_a_person() -> None:
    model = ReuseModel()
    calls = [(turn * pause, turn, kind) for kind, pause in ((Kind.TOOL, 10.0), (Kind.CHAT, 200.0)) for turn in range(60)]
    for at, turn, kind in sorted(calls):
        blocks = path(kind.value, 3 + turn)
        model.arrived(blocks, at)
        model.finished(blocks, kind, at + 1)
    now = 59 * 200.0 + 1
    tool, chat = path("x", 4), path("y", 4)
    model.arrived(tool, now)
    model.finished(tool, Kind.TOOL, now)
    model.arrived(chat, now)
    model.finished(chat, Kind.CHAT, now)
    model.refresh(now)
    assert model.probability(tool[0], now, 20.0) > 2 * model.probability(chat[0], now, 20.0)


def test_what_a_reply_added_belongs_to_the_conversation() -> None:
    model = ReuseModel()
    model.arrived(path("a", 3), 0.0)
    reply = BlockKey(b"reply")
    model.adopt(reply, path("a", 3)[-1])
    assert model.rate(reply, 1.0) == model.rate(path("a", 1)[0], 1.0)
    model.adopt(BlockKey(b"orphan"), BlockKey(b"unknown"))
    assert model.rate(BlockKey(b"orphan"), 1.0) == 0.0


def test_unknown_blocks_and_empty_paths() -> None:
    model = ReuseModel()
    assert model.arrived([], 0.0).n_blocks == 0
    model.finished([], Kind.CHAT, 1.0)
    model.finished(path("never", 2), Kind.CHAT, 1.0)
    assert model.rate(BlockKey(b"never"), 1.0) == 0.0
    assert model.probability(BlockKey(b"never"), 1.0, 1e6) == 0.0


def test_keys_are_bounded() -> None:
    model = ReuseModel(remembered_keys=100)
    for number in range(50):
        model.arrived(path(str(number), 10), float(number))
    assert len(model._visits) == 100
    assert model.rate(path("0", 1)[0], 50.0) == 0.0
    assert model.rate(path("49", 1)[0], 50.0) > 0.0
