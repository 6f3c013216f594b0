"""What in a request log keeps prompts from being found: each rule is a function from requests to at most one finding.

A prompt is found as far as it agrees, from its first token on, with one that came before. So every rule looks for prompts that
mean the same and differ early. Rules read texts, not tokens, and count four characters as a token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from pasture.observe.findings import Finding
from pasture.observe.requests import LoggedRequest, Message

_CHARACTERS_A_TOKEN = 4
_QUOTED = 60
_LONG = 200
"""characters from which on a paragraph counts as a document, and a text as one that goes on alike"""
_CHANGE = 400
"""characters that a change takes at most"""
_NEIGHBOURS = 8
"""prompts that each is compared with: so many applications may take turns"""
_TIME = re.compile(
    r"\d{1,2}:\d{2}|\d{4}-\d{2}-\d{2}|\d{1,2}[./]\d{1,2}[./]\d{2,4}|\b1\d{9,12}\b"
    r"|\b(?:mon|tues|wednes|thurs|fri|satur|sun)day\b",
    re.IGNORECASE,
)
_THINKING = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>\s*", re.S)


def examine_traffic(requests: Sequence[LoggedRequest]) -> list[Finding]:
    """Everything that is wrong, the order of `_RULES`."""
    return [finding for finding in (rule(requests) for rule in _RULES) if finding is not None]


def changing_head(requests: Sequence[LoggedRequest]) -> Finding | None:
    """System prompts that are the same but for a short change near their beginning, and perhaps for their end."""
    prompts = list(dict.fromkeys(request.system for request in requests if request.system))
    for first, second in _pairs(prompts):
        at = _agreeing(first, second)
        again = _again(first, second, at)
        if again is None:
            continue
        on_first, on_second = again
        behind = _agreeing(first[on_first:], second[on_second:])
        if behind < at:
            continue
        one, other = _around(first, at, on_first), _around(second, at, on_second)
        timed = bool(_TIME.search(one) and _TIME.search(other))
        what = "a timestamp" if timed else "something that changes"
        n = sum(request.system.startswith(first[:at]) for request in requests)
        return Finding(
            "timestamp_in_head" if timed else "changing_head",
            f"{what} stands {at} characters into a system prompt that is otherwise the same",
            f"{n} requests begin alike; then “{one}” and “{other}”. "
            f"About {behind // _CHARACTERS_A_TOKEN} tokens behind it are computed again each time",
            "move it to the end of the system prompt, or into the last user message"
            + ("; a date without the time changes once a day" if timed else ""),
        )
    return None


def changing_tools(requests: Sequence[LoggedRequest]) -> Finding | None:
    """The same tools in different orders: templates write them at the beginning of the prompt."""
    orders: dict[tuple[str, ...], dict[tuple[str, ...], int]] = {}
    for request in requests:
        if len(request.tools) > 1:
            orders.setdefault(tuple(sorted(request.tools)), {}).setdefault(request.tools, request.line)
    for same in orders.values():
        if len(same) > 1:
            lines = ", ".join(str(line) for line in list(same.values())[:3])
            return Finding(
                "tools_in_changing_order",
                f"the same {len(next(iter(same)))} tools are sent in {len(same)} different orders",
                f"first seen in lines {lines}",
                "sort the tools by name before sending them",
            )
    return None


def changing_documents(requests: Sequence[LoggedRequest]) -> Finding | None:
    """The same long paragraphs in different orders."""
    seen: dict[frozenset[str], tuple[tuple[str, ...], int]] = {}
    for request in requests:
        for message in request.messages:
            parts = tuple(part for part in re.split(r"\n\s*\n", message.content) if len(part) >= _LONG)
            if len(parts) < 2:
                continue
            order, line = seen.setdefault(frozenset(parts), (parts, request.line))
            if order != parts:
                return Finding(
                    "documents_in_changing_order",
                    f"the same {len(parts)} documents are sent in different orders",
                    f"lines {line} and {request.line}: first “{order[0][:_QUOTED]}”, then “{parts[0][:_QUOTED]}”",
                    "send documents in a fixed order, the ones that most requests have first",
                )
    return None


def stripped_reasoning(requests: Sequence[LoggedRequest]) -> Finding | None:
    """Replies come back without the reasoning that they were generated with, so the cache holds another text."""
    for earlier, later in _turns(requests):
        sent = [*earlier.messages]
        if earlier.reply is not None:
            sent.append(Message("assistant", earlier.reply))
        for index, (before, after) in enumerate(zip(sent, later.messages, strict=False)):
            if (
                before.role == "assistant"
                and before != after
                and _THINKING.sub("", before.content).strip() == after.content.strip()
            ):
                return Finding(
                    "stripped_reasoning",
                    "reasoning is taken out of replies before they are sent back, so a conversation parts from its own past",
                    f"message {index + 1}: {len(before.content)} characters when it was generated (line {earlier.line}), "
                    f"{len(after.content)} when it came back (line {later.line})",
                    "send replies back as they came, or accept that each turn computes the last reply again; "
                    "if the chat template takes it out, a template that keeps it",
                )
    return None


def edited_history(requests: Sequence[LoggedRequest]) -> Finding | None:
    """A conversation whose past was changed: everything behind the change is computed again."""
    for earlier, later in _turns(requests):
        for index, (before, after) in enumerate(zip(earlier.messages, later.messages, strict=False)):
            if before == after:
                continue
            if _THINKING.sub("", before.content).strip() == after.content.strip():
                break
            cut = after in earlier.messages[index + 1 :]
            if index == 0:  # no system prompt: one equal message is somebody who says it again, two in a row are a past
                cut = cut and any(later.messages[:2] == pair for pair in pairwise(earlier.messages))
            if cut:
                return Finding(
                    "history_cut_at_the_front",
                    "old messages are dropped from the beginning of a conversation, so nothing behind them is found",
                    f"line {later.line} goes on from line {earlier.line} without its message {index + 1}",
                    "drop many messages seldom instead of one every turn, or summarise them once",
                )
            if index == 0 or not any(message in later.messages[index + 1 :] for message in earlier.messages[index + 1 :]):
                break  # a branch: nothing of what came after was kept
            return Finding(
                "edited_history",
                "a conversation's past was changed between two turns",
                f"message {index + 1} was “{before.content[:_QUOTED]}” in line {earlier.line} and is "
                f"“{after.content[:_QUOTED]}” in line {later.line}",
                "append, and leave what was sent as it was; corrections belong into the next message",
            )
    return None


def equal_prompts_apart(requests: Sequence[LoggedRequest]) -> Finding | None:
    """Tenants that send the same system prompt and cannot share it."""
    tenants: dict[str, set[str]] = {}
    for request in requests:
        if request.tenant is not None and len(request.system) >= _LONG:
            tenants.setdefault(request.system, set()).add(request.tenant)
    for prompt, names in tenants.items():
        if len(names) > 1:
            return Finding(
                "equal_prompts_apart",
                f"{len(names)} tenants send the same system prompt, and each has it computed and stored for itself",
                f"“{prompt[:_QUOTED]}…” (about {len(prompt) // _CHARACTERS_A_TOKEN} tokens): {', '.join(sorted(names)[:5])}",
                "declare it public, if it is no secret: pasture public",
            )
    return None


_RULES: tuple[Callable[[Sequence[LoggedRequest]], Finding | None], ...] = (
    changing_head,
    changing_tools,
    changing_documents,
    stripped_reasoning,
    edited_history,
    equal_prompts_apart,
)


def _pairs(prompts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each with the next few in sorted order: those with the longest common beginnings, also where applications take turns."""
    ordered = sorted(prompts)
    for index, first in enumerate(ordered):
        for second in ordered[index + 1 : index + 1 + _NEIGHBOURS]:
            yield first, second


def _again(first: str, second: str, at: int) -> tuple[int, int] | None:
    """Where in each the text goes on alike behind a short change that begins at `at`; None where it does not."""
    for start in range(at, min(at + _CHANGE, len(first) - _LONG + 1)):
        found = second.find(first[start : start + _LONG], at, at + _CHANGE + _LONG)
        if found >= 0:
            return start, found
    return None


def _agreeing(first: str, second: str) -> int:
    """Characters from the start. Halves the stretch in question, so that comparing is not Python's but C's."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _around(text: str, start: int, end: int) -> str:
    """The words that `[start, end)` touches."""
    left = max(text.rfind(" ", 0, start), text.rfind("\n", 0, start)) + 1
    right = re.compile(r"\s|$").search(text, max(end, start))
    assert right is not None  # `$` is always there
    return text[left : right.start()][:_QUOTED]


def _turns(requests: Sequence[LoggedRequest]) -> Iterator[tuple[LoggedRequest, LoggedRequest]]:
    """Consecutive requests of the same person with the same system prompt, the later one no new conversation."""
    last: dict[tuple[str | None, str], LoggedRequest] = {}
    for request in requests:
        opening = next((message.content for message in request.messages if message.role == "user"), "")
        whose = request.user if request.user is not None else opening
        earlier = last.get((whose, request.system))
        if earlier is not None and len(request.messages) > 1 and _related(earlier, request):
            yield earlier, request
        last[whose, request.system] = request


def _related(earlier: LoggedRequest, later: LoggedRequest) -> bool:
    """Whether they have a message of a person's or the model's in common."""
    spoken = {message for message in earlier.messages if message.role in ("user", "assistant")}
    return any(message in spoken for message in later.messages)
