"""Token bytes -> text, a piece at a time, never half a character.

A token may end inside a UTF-8 character. Its bytes are held until the character is complete; bytes that cannot be part of one
become U+FFFD. Whatever the chunking, the texts joined equal `all_bytes.decode("utf-8", errors="replace")`.

Owned by one reply; no thread of its own.
"""

from __future__ import annotations

from codecs import utf_8_decode


class Detokenizer:
    """Holds the bytes of a character that is not complete yet (three at most)."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = b""

    def push(self, piece: bytes) -> str:
        """The characters that `piece` completes; mutates the held bytes."""
        data = self._held + piece if self._held else piece
        text, used = utf_8_decode(data, "replace", False)
        self._held = data[used:]
        return text

    def finish(self) -> str:
        """What is left when no byte will follow: U+FFFD for an unfinished character, or nothing."""
        text, _ = utf_8_decode(self._held, "replace", True)
        self._held = b""
        return text
