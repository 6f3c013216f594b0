"""Sizes and durations are read as people write them, and what is ambiguous is refused with a hint."""

from __future__ import annotations

import pytest

from pasture.config import format_bytes, format_seconds, parse_bytes, parse_seconds


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("2GiB", 2 << 30),
        ("2 GiB", 2 << 30),
        ("1.5gib", 3 << 29),
        ("512MiB", 512 << 20),
        ("4KiB", 4096),
        ("1TiB", 1 << 40),
        ("2GB", 2 * 10**9),
        ("3MB", 3 * 10**6),
        ("1kB", 1000),
        ("100B", 100),
        ("4096", 4096),
        (4096, 4096),
    ],
)
def test_sizes(text: str | int, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "2 GiB 3", "two", "1e3", "2XB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a"):
        parse_bytes(text)


def test_a_bare_letter_means_two_things() -> None:
    with pytest.raises(ValueError, match="write 2GiB or 2GB"):
        parse_bytes("2G")


@pytest.mark.parametrize(
    ("text", "seconds"), [("200ms", 0.2), ("1.5s", 1.5), ("2m", 120), ("1h", 3600), ("3", 3), (0.25, 0.25), ("250 us", 0.00025)]
)
def test_durations(text: str | float, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["soon", "5 days", "-1s", ""])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_seconds(text)


def test_numbers_are_shown_in_units_people_use() -> None:
    assert [format_bytes(n) for n in (512, 23_040, 2 << 30)] == ["512 B", "22.5 KiB", "2 GiB"]
    assert [format_seconds(s) for s in (0.2, 1.5, 600, 7200)] == ["200 ms", "1.5 s", "10 m", "2 h"]
