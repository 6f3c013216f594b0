"""The doctor's rules over request logs: each planted fault is found, and a healthy log is healthy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import pytest

from pasture.core.errors import ConfigError
from pasture.observe import Finding, examine_traffic, read_log

RULES = (
    "You are the assistant of a team that keeps sheep on a common pasture. Be brief, be kind, and never invent numbers. " * 5
)
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("count", "shear", "feed")]


def said(*texts: str, system: str = RULES) -> list[dict[str, str]]:
    """A conversation: the person's and the model's messages in turn."""
    roles = ("user", "assistant")
    return [{"role": "system", "content": system}, *({"role": roles[i % 2], "content": text} for i, text in enumerate(texts))]


def examine(*entries: Mapping[str, object]) -> list[Finding]:
    return examine_traffic(read_log(json.dumps(entry) for entry in entries))


def names(findings: Sequence[Finding]) -> list[str]:
    return [finding.name for finding in findings]


def test_a_healthy_log_has_nothing_wrong() -> None:
    first = said("How many sheep?")
    second = said("How many sheep?", "Forty.", "And goats?")
    found = examine(
        {"user": "ada", "messages": first, "tools": TOOLS, "reply": "Forty."},
        {"user": "bob", "messages": said("Who shears?"), "tools": TOOLS},
        {"user": "ada", "messages": second, "tools": TOOLS},
        {"user": "ada", "messages": said("A new conversation"), "tools": TOOLS},
        {"user": "eve", "messages": said("Hello", system="Translate into French, and nothing else."), "tenant": "sales"},
    )
    assert found == []


def test_a_timestamp_at_the_head_is_found_with_both_of_its_values() -> None:
    (finding,) = examine(
        *({"messages": said("Hi", system=f"It is 2031-05-04 09:{minute}:00. {RULES}")} for minute in (10, 11, 12))
    )
    assert finding.name == "timestamp_in_head"
    assert "“09:10:00.” and “09:11:00.”" in finding.evidence


def test_a_name_at_the_head_is_something_that_changes() -> None:
    (finding,) = examine(*({"messages": said("Hi", system=f"You talk to {name}. {RULES}")} for name in ("Ada", "Bob")))
    assert finding.name == "changing_head"
    assert "“Ada.” and “Bob.”" in finding.evidence


def test_a_timestamp_is_found_where_the_prompts_end_differs_too() -> None:
    (finding,) = examine(
        *(
            {"messages": said("Hi", system=f"It is 09:{minute}. {RULES} User: {user}, {'since long ' * 60}")}
            for minute, user in ((10, "Ada"), (11, "Bob"))
        )
    )
    assert finding.name == "timestamp_in_head"
    assert f"About {len(f'. {RULES} User: ') // 4} tokens" in finding.evidence


def test_applications_that_take_turns_do_not_hide_a_timestamp() -> None:
    jobs = (RULES, "You are the assistant of a bakery. Be warm, sell bread, and never invent prices. " * 7)
    (finding,) = examine(
        *({"messages": said("Hi", system=f"It is 09:{minute}. {jobs[minute % 2]}")} for minute in range(10, 14))
    )
    assert finding.name == "timestamp_in_head"


def test_a_change_behind_most_of_a_prompt_costs_little() -> None:
    assert (
        examine(*({"messages": said("Hi", system=f"{RULES} You talk to {name}. {RULES[:300]}")} for name in ("Ada", "Bob")))
        == []
    )


def test_different_prompts_are_no_changing_head() -> None:
    assert examine({"messages": said("Hi")}, {"messages": said("Hi", system="Quite another job. " * 20)}) == []


def test_what_changes_at_the_end_of_a_prompt_costs_little() -> None:
    assert examine(*({"messages": said("Hi", system=f"{RULES} You talk to {name}.")} for name in ("Ada", "Bob"))) == []


def test_tools_in_another_order_are_found() -> None:
    (finding,) = examine(
        {"user": "a", "messages": said("Hi"), "tools": TOOLS}, {"user": "b", "messages": said("Hi"), "tools": TOOLS[::-1]}
    )
    assert finding.name == "tools_in_changing_order"
    assert finding.evidence == "first seen in lines 1, 2"


def test_documents_in_another_order_are_found() -> None:
    documents = [f"Volume {i} of the handbook. " * 20 for i in range(3)]
    asked = ["\n\n".join(order) + "\n\nWhat now?" for order in (documents, documents[::-1])]
    found = examine(*({"user": str(i), "messages": said(text)} for i, text in enumerate(asked)))
    assert names(found) == ["documents_in_changing_order"]


@pytest.mark.parametrize("logged_reply", [True, False])
def test_reasoning_that_was_taken_out_is_found(logged_reply: bool) -> None:
    thought = "<think>Count them all.</think>\nForty."
    if logged_reply:
        first: dict[str, object] = {"user": "ada", "messages": said("How many?"), "reply": thought}
    else:
        first = {"user": "ada", "messages": said("How many?", thought, "Sure?")}
    found = examine(first, {"user": "ada", "messages": said("How many?", "Forty.", "Sure?", "Yes.", "And goats?")})
    assert names(found) == ["stripped_reasoning"]


def test_an_edited_past_is_found() -> None:
    (finding,) = examine(
        {"user": "ada", "messages": said("How many sheep?", "Forty.", "Sure?")},
        {"user": "ada", "messages": said("How many sheep?", "Forty-one.", "Sure?", "Yes.", "Thanks")},
    )
    assert finding.name == "edited_history"
    assert "“Forty.” in line 1" in finding.evidence


def test_a_branch_is_no_edit() -> None:
    found = examine(
        {"user": "ada", "messages": said("How many sheep?", "Forty.", "Sure?", "Yes.", "Thanks")},
        {"user": "ada", "messages": said("How many sheep?", "Forty.", "And goats?")},
    )
    assert found == []


def test_a_past_that_loses_its_beginning_is_found() -> None:
    talk = ["one", "1", "two", "2", "three", "3", "four"]
    found = examine({"user": "ada", "messages": said(*talk[:5])}, {"user": "ada", "messages": said(*talk[2:])})
    assert names(found) == ["history_cut_at_the_front"]


def test_a_window_that_slides_without_a_system_prompt_is_found() -> None:
    talk = said("one", "1", "two", "2", "three", "3", "four")[1:]
    found = examine({"user": "ada", "messages": talk[:5]}, {"user": "ada", "messages": talk[2:]})
    assert names(found) == ["history_cut_at_the_front"]


def test_who_says_the_same_again_has_cut_nothing() -> None:
    talk = said("one", "1", "thanks")[1:]
    anew = said("thanks", "You're welcome.", "one")[1:]
    assert examine({"user": "ada", "messages": talk}, {"user": "ada", "messages": anew}) == []


def test_equal_prompts_of_tenants_are_found() -> None:
    found = examine({"tenant": "sales", "messages": said("Hi")}, {"tenant": "support", "body": {"messages": said("Hello")}})
    assert names(found) == ["equal_prompts_apart"]


def test_parts_of_text_are_one_text() -> None:
    parts = [{"type": "text", "text": RULES[:50]}, {"type": "text", "text": RULES[50:]}]
    (request,) = read_log([json.dumps({"messages": [{"role": "system", "content": parts}]})])
    assert request.system == RULES


@pytest.mark.parametrize(
    "line", ["no json", "[]", "{}", '{"messages": []}', '{"messages": [1]}', '{"body": 3}', '{"messages": [{}]}']
)
def test_a_line_that_is_no_request_is_named(line: str) -> None:
    with pytest.raises(ConfigError, match="line 3 is not a chat request"):
        read_log([json.dumps({"messages": said("Hi")}), "", line])
