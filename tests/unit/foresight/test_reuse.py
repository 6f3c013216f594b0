"""The reuse model: conversations are recognised, shared prefixes have rates, and everything is bounded."""

from __future__ import annotations

import pytest

from pasture.core.storage import BlockKey
from pasture.core.values import Kind
from pasture.foresight import reuse
from pasture.foresight.reuse import LEFT_BEHIND, ReuseModel, Visit


def path(name: str, n_blocks: int, head: str = "") -> list[BlockKey]:
    """`head` (one letter a block) followed by blocks of its own."""
    return [BlockKey(f"head-{letter}".encode()) for letter in head] + [
        BlockKey(f"{name}-{i}".encode()) for i in range(n_blocks)
    ]


def served(model: ReuseModel, blocks: list[BlockKey], now: float, kind: Kind = Kind.CHAT) -> Visit:
    """A request whose reply comes at once."""
    visit = model.arrived(blocks, now)
    model.finished(blocks, kind, now)
    return visit


def test_a_request_that_goes_on_continues_the_conversation() -> None:
    model = ReuseModel()
    first = served(model, path("a", 3), 0.0)
    second = served(model, path("a", 5), 30.0)
    third = served(model, path("a", 8), 60.0)
    assert [visit.turn for visit in (first, second, third)] == [0, 1, 2]
    assert [visit.wait.over for visit in (first, second, third)] == [True, True, False]


def test_a_common_head_makes_no_conversation_but_has_an_arrival_rate() -> None:
    model = ReuseModel()
    for number in range(20):
        visit = served(model, path(f"user{number}", 4, head="s"), number * 10.0)
        assert visit.turn == 0
    head, own = path("user19", 4, head="s")[:2]
    assert model.arrival_rate(head, 200.0) == pytest.approx(0.1, rel=0.85)
    assert model.arrival_rate(own, 200.0) == 0.0
    assert model.rate(head, 200.0) > 3 * model.rate(own, 200.0)
    assert model.probability(head, 200.0, 600.0) > 0.9
    assert model.arrival_rate(head, 10_000.0) < 1e-6, "what nobody asks for any more fades"


HEAD = "abcdefghijklmno"


def test_a_team_with_a_common_head_is_as_many_conversations_and_each_return_is_recognised() -> None:
    model = ReuseModel()
    team = ["ann", "bob", "eve"]
    first = [served(model, path(name, 2, HEAD), 10.0 * number) for number, name in enumerate(team)]
    assert [visit.turn for visit in first] == [0, 0, 0]
    assert [visit.wait.over for visit in first] == [False, False, False], "nobody's wait ends because another comes"
    assert model.arrival_rate(path("", 0, HEAD)[-1], 30.0) > 0
    assert model.arrival_rate(path("ann", 1)[0], 30.0) == 0.0
    second = [served(model, path(name, 4, HEAD), 60.0 + 10 * number) for number, name in enumerate(team)]
    assert [visit.turn for visit in second] == [1, 1, 1]
    assert [visit.wait.over for visit in first] == [True, True, True]
    asked = [served(model, path(name, 1, HEAD), 120.0) for name in ("joe", "jim")]
    assert [visit.turn for visit in asked] == [0, 0], "common blocks alone do not show whose turn it is"


def test_the_last_block_of_a_prompt_may_be_rendered_otherwise_next_time() -> None:
    model = ReuseModel()
    prompt = [*path("a", 3), BlockKey(b"the reply begins here")]
    served(model, prompt, 0.0)
    assert served(model, path("a", 5), 30.0).turn == 1


def test_who_comes_while_another_still_runs_is_not_its_next_turn() -> None:
    model = ReuseModel()
    ann, bob = path("ann", 1, HEAD), path("bob", 1, HEAD)
    one, other = model.arrived(ann, 0.0), model.arrived(bob, 1.0)
    assert (one.turn, other.turn) == (0, 0)
    model.finished([*ann, BlockKey(b"to ann")], Kind.TOOL, 5.0)
    model.finished([*bob, BlockKey(b"to bob")], Kind.CHAT, 6.0)
    assert (one.kind, one.wait.since, other.kind, other.wait.since) == (Kind.TOOL, 5.0, Kind.CHAT, 6.0)
    assert served(model, [*ann, BlockKey(b"to ann"), *path("ann again", 1)], 30.0).turn == 1
    assert (one.wait.over, other.wait.over) == (True, False)


def test_several_answers_to_one_prompt_are_one_visit_whose_wait_begins_with_the_last() -> None:
    model = ReuseModel()
    prompt = path("a", 3)
    visits = [model.arrived(prompt, 0.0) for _ in range(3)]
    assert visits[0] is visits[1] is visits[2]
    assert model.arrival_rate(prompt[0], 1.0) == 0.0
    for number in range(3):
        assert visits[0].n_running == 3 - number
        model.finished([*prompt, BlockKey(b"answer %d" % number)], Kind.CHAT, 10.0 + number)
    assert visits[0].wait.since == 12.0
    assert model.returns._n_open == 1
    assert served(model, [*prompt, BlockKey(b"answer 1"), *path("a again", 1)], 60.0).turn == 1


def test_what_never_finishes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reuse, "REMEMBERED_REQUESTS", 10)
    model = ReuseModel()
    for number in range(50):
        model.arrived(path(str(number), 2), float(number))
    assert len(model._running) == 10
    model.finished(path("0", 2), Kind.CHAT, 50.0)
    model.finished(path("49", 2), Kind.CHAT, 50.0)
    assert len(model._running) == 9


def test_a_conversation_returning_to_its_own_blocks_is_no_arrival_of_others() -> None:
    model = ReuseModel()
    for turn in range(10):
        served(model, path("a", 3 + turn), turn * 20.0)
    assert model.arrival_rate(path("a", 1)[0], 200.0) == 0.0


def test_what_a_conversation_left_behind_is_worth_little() -> None:
    model = ReuseModel()
    old = [*path("a", 4), BlockKey(b"reply that was edited away")]
    served(model, old, 0.0)
    served(model, path("a", 6), 50.0)
    model.refresh(60.0)
    assert model.rate(old[-1], 60.0) < 2 * LEFT_BEHIND * model.rate(old[0], 60.0)
    assert model.probability(old[-1], 60.0, 60.0) < model.probability(old[0], 60.0, 60.0) / 5


def test_conversations_that_came_back_before_are_worth_more() -> None:
    model = ReuseModel()
    now = 0.0
    for number in range(300):
        now = number * 10.0
        served(model, path(f"once{number}", 4), now)
        regular = number % 10
        served(model, path(f"regular{regular}", 3 + number // 10), now + 1)
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
    served(model, tool, now, Kind.TOOL)
    served(model, chat, now)
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
    assert served(model, [], 0.0).n_blocks == 0
    model.finished(path("never", 2), Kind.CHAT, 1.0)
    assert model.rate(BlockKey(b"never"), 1.0) == 0.0
    assert model.probability(BlockKey(b"never"), 1.0, 1e6) == 0.0


def test_keys_are_bounded() -> None:
    model = ReuseModel(remembered_keys=100)
    for number in range(50):
        served(model, path(str(number), 10), float(number))
    assert len(model._visits) == 100
    assert model.rate(path("0", 1)[0], 50.0) == 0.0
    assert model.rate(path("49", 1)[0], 50.0) > 0.0
