"""How much of a prompt was asked for before."""

from __future__ import annotations

from array import array

from pasture.core.asked import Asked
from pasture.core.values import DEFAULT_NAMESPACE, Namespace

HEAD = tuple(range(150))


def test_two_prompts_have_whole_blocks_in_common() -> None:
    asked = Asked()
    prompts = [(*HEAD, *[200 + i] * 60) for i in range(3)]
    assert [asked.note(DEFAULT_NAMESPACE, prompt) for prompt in prompts] == [0, 128, 128]
    assert asked.note(DEFAULT_NAMESPACE, array("i", prompts[0])) == 192
    assert asked.note(Namespace("others"), prompts[0]) == 0
    assert asked.note(DEFAULT_NAMESPACE, prompts[0][:63]) == 0


def test_what_was_asked_for_longest_ago_is_forgotten() -> None:
    asked = Asked(max_blocks=4)
    for first in range(100):
        asked.note(DEFAULT_NAMESPACE, [first] * 128)
    assert len(asked) == 4
    assert asked.note(DEFAULT_NAMESPACE, [99] * 128) == 128
    assert asked.note(DEFAULT_NAMESPACE, [0] * 128) == 0
