from __future__ import annotations

from pasture.text.detokenizer import Detokenizer


def test_a_character_is_shown_when_its_last_byte_has_come() -> None:
    detokenizer = Detokenizer()
    assert [detokenizer.push(bytes([byte])) for byte in "🐑".encode()] == ["", "", "", "🐑"]
    assert detokenizer.finish() == ""


def test_text_before_an_unfinished_character_is_not_held_back() -> None:
    detokenizer = Detokenizer()
    assert detokenizer.push(b"wool \xc3") == "wool "
    assert detokenizer.push(b"\xa9!") == "é!"


def test_an_unfinished_character_at_the_end_becomes_a_replacement() -> None:
    detokenizer = Detokenizer()
    assert detokenizer.push(b"a\xf0\x9f\x90") == "a"
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""


def test_bytes_that_belong_to_no_character_are_replaced_at_once() -> None:
    detokenizer = Detokenizer()
    assert detokenizer.push(b"\xff") == "\ufffd"
    assert detokenizer.push(b"\xc3") == ""
    assert detokenizer.push(b"(") == "\ufffd("
