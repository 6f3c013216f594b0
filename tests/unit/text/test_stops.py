from __future__ import annotations

from pasture.text.stops import Scanned, StopScanner, StopStrings


def scan(stops: list[str], *chunks: str) -> list[Scanned]:
    scanner = StopScanner(StopStrings.of(stops))
    return [scanner.push(chunk) for chunk in chunks]


def test_a_stop_string_across_three_chunks_is_found_and_cut_off() -> None:
    assert scan(["\nUser:"], "Hello\nU", "se", "r: me") == [Scanned("Hello"), Scanned(""), Scanned("", "\nUser:")]


def test_exactly_the_longest_possible_beginning_is_withheld() -> None:
    assert scan(["abcd"], "xxab", "ab", "cx") == [Scanned("xx"), Scanned("ab"), Scanned("abcx")]


def test_a_stop_string_that_overlaps_its_own_false_start_is_found() -> None:
    assert scan(["aab"], "aaab") == [Scanned("a", "aab")]


def test_the_stop_string_completed_first_wins_over_one_that_began_earlier() -> None:
    assert scan(["abcd", "bc"], "xabcd") == [Scanned("xa", "bc")]


def test_the_longer_of_two_completed_together_wins() -> None:
    assert scan(["c", "abc"], "xabc") == [Scanned("x", "abc")]


def test_withheld_text_comes_out_at_the_end() -> None:
    scanner = StopScanner(StopStrings.of(["END"]))
    assert scanner.push("the EN").text == "the "
    assert scanner.finish() == "EN"
    assert scanner.finish() == ""


def test_empty_and_repeated_stop_strings_count_once_or_not_at_all() -> None:
    stops = StopStrings.of(["", "a", "a"])
    assert len(stops.patterns) == 1
    assert not StopStrings.of([""])


def test_a_long_stop_string_that_almost_matches_everywhere() -> None:
    """Looking for each beginning of it anew after every chunk would not end within the test's timeout."""
    scanner = StopScanner(StopStrings.of(["a" * 100_000 + "b"]))
    assert "".join(scanner.push("a" * 1000).text for _ in range(150)) == "a" * 50_000
    assert scanner.push("b").stop == "a" * 100_000 + "b"


def test_one_stop_string_is_not_its_characters() -> None:
    assert StopStrings.of("END") == StopStrings.of(["END"])
