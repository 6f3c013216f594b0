"""The stop scanner against a search of the whole text, for any stop strings and any chunking."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pasture.text.stops import StopScanner, StopStrings

LETTERS = "ab\n"
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=5), min_size=1, max_size=4)
CHUNKS = st.lists(st.text(LETTERS, max_size=6), max_size=10)


def naive(text: str, stops: list[str]) -> tuple[str, str] | None:
    """(text before, stop string) of the occurrence that ends first; of several ending there, the longest."""
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return None
    end, _, stop = min(ends)
    return text[: end - len(stop)], stop


@given(STOPS, CHUNKS)
def test_the_outcome_is_that_of_a_search_in_the_whole_text(stops: list[str], chunks: list[str]) -> None:
    scanner = StopScanner(StopStrings.of(stops))
    shown = ""
    for chunk in chunks:
        scanned = scanner.push(chunk)
        shown += scanned.text
        if scanned.stop is not None:
            assert (shown, scanned.stop) == naive("".join(chunks), stops)
            return
    assert naive("".join(chunks), stops) is None
    assert shown + scanner.finish() == "".join(chunks)


@given(STOPS, CHUNKS)
def test_exactly_the_longest_beginning_of_a_stop_string_is_withheld(stops: list[str], chunks: list[str]) -> None:
    scanner = StopScanner(StopStrings.of(stops))
    seen = shown = ""
    for chunk in chunks:
        scanned = scanner.push(chunk)
        if scanned.stop is not None:
            return
        seen += chunk
        shown += scanned.text
        beginnings = [stop[:length] for stop in stops for length in range(1, len(stop))]
        longest = max((len(part) for part in beginnings if seen.endswith(part)), default=0)
        assert shown == seen[: len(seen) - longest]
