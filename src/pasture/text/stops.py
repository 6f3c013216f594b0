"""Stop strings in a text that arrives in chunks.

A stop string may begin in one chunk and end in a later one, so the scanner withholds exactly the longest suffix of the text
that is a proper prefix of some stop string, and releases everything before it. The stop string completed first wins; where
two are completed by the same character, the longer does, since it began earlier. The outcome does not depend on the chunking.

One Knuth-Morris-Pratt automaton a stop string: the state after a character is the length of the longest prefix of the stop
string that the text ends with, which is both what to withhold and, at full length, the match. Amortised O(1) a character and
stop string, whatever the strings are. Source: Knuth, Morris, Pratt, "Fast pattern matching in strings" (1977).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopStrings:
    """The stop strings of a request, with their failure tables; shared by its choices. Empty strings are dropped."""

    patterns: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """(stop string, for each length k the longest proper border of its first k characters)"""
    first_characters: frozenset[str] = frozenset()

    @classmethod
    def of(cls, strings: str | Iterable[str]) -> StopStrings:
        unique = tuple(dict.fromkeys(string for string in ((strings,) if isinstance(strings, str) else strings) if string))
        return cls(tuple((s, _borders(s)) for s in unique), frozenset(s[0] for s in unique))

    def __bool__(self) -> bool:
        return bool(self.patterns)


@dataclass(frozen=True, slots=True)
class Scanned:
    """Text that may be shown now, and the stop string that ended the text, if one did."""

    text: str
    stop: str | None = None


class StopScanner:
    """Scans one reply. After a stop was found, push no more."""

    __slots__ = ("_held", "_states", "_stops")

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._states = [0] * len(stops.patterns)
        self._held = ""

    def push(self, chunk: str) -> Scanned:
        """Release what can no longer belong to a stop string; mutates the withheld text."""
        if not self._held and self._stops.first_characters.isdisjoint(chunk):
            return Scanned(chunk)
        text = self._held + chunk
        for end in range(len(self._held), len(text)):
            stop = self._advance(text[end])
            if stop is not None:
                self._held = ""
                return Scanned(text[: end + 1 - len(stop)], stop)
        shown = len(text) - max(self._states)
        self._held = text[shown:]
        return Scanned(text[:shown])

    def finish(self) -> str:
        """The withheld text, when nothing follows that could complete a stop string."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        """Move every automaton by one character; the longest stop string that it completes."""
        found: str | None = None
        for i, (pattern, borders) in enumerate(self._stops.patterns):
            state = self._states[i]
            while state and pattern[state] != character:
                state = borders[state]
            if pattern[state] == character:
                state += 1
            self._states[i] = state
            if state == len(pattern) and (found is None or state > len(found)):
                found = pattern
        return found


def _borders(pattern: str) -> tuple[int, ...]:
    borders = [0, 0]
    for length in range(1, len(pattern)):
        border = borders[length]
        while border and pattern[border] != pattern[length]:
            border = borders[border]
        borders.append(border + 1 if pattern[border] == pattern[length] else 0)
    return tuple(borders)
