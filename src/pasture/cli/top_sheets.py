"""The tables of `pasture top`: which columns each has, and its rows in a snapshot. Pure.

A cell is what it is sorted by and how it is shown; a row has the key that it is known by from one look to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pasture.cli.top_picture import Json
from pasture.config import format_bytes


class Cell(NamedTuple):
    """One value."""

    order: float | str
    text: str


Row = tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Sheet:
    """One table."""

    name: str
    columns: tuple[str, ...]
    rows: Callable[[Json], Iterator[Row]]
    sorted_by: int
    """column, at first; the largest comes first"""


def sheets(snapshot: Json) -> tuple[Sheet, ...]:
    """The tables that such a server has something for."""
    return (_SEQUENCES, _PREFIXES_OF_ALL, *_OTHERS, _REPLICAS) if "cluster" in snapshot else (_SEQUENCES, _PREFIXES, *_OTHERS)


def _sequences(snapshot: Json) -> Iterator[Row]:
    for number, state, tokens, shared, idle, prefix in snapshot["sequences"]:
        yield _number(number), _word(state), _number(tokens), _number(shared), _seconds(idle), _number(prefix)


def _prefixes(snapshot: Json) -> Iterator[Row]:
    for number, parent, namespace, start, tokens, holders, running, idle, hits, _ in snapshot["prefixes"]:
        saved = tokens * max(0, holders - 1)
        counts = (number, parent, namespace, start, tokens, holders, running, hits, saved)
        yield *map(_number, counts), _seconds(idle)


def _prefixes_of_all(snapshot: Json) -> Iterator[Row]:
    for cells, row in zip(_prefixes(snapshot), snapshot["prefixes"], strict=True):
        yield *cells, _word(row[-1])


def _tenants(snapshot: Json) -> Iterator[Row]:
    for number, cells, shared, sequences, hits, misses in snapshot["namespaces"]:
        asked = hits + misses
        share = Cell(hits / asked if asked else -1.0, f"{100 * hits / asked:.0f} %" if asked else "–")
        yield *map(_number, (number, cells, shared, sequences, hits, misses)), share


def _tiers(snapshot: Json) -> Iterator[Row]:
    for tier in snapshot["tiers"]:
        sizes = (_bytes(tier[name]) for name in ("bytes", "budget_bytes", "written_bytes", "read_bytes"))
        counts = (_number(tier[name]) for name in ("blocks", "hit_tokens", "evicted_blocks", "errors"))
        yield _word(tier["name"]), *sizes, *counts


def _events(snapshot: Json) -> Iterator[Row]:
    for _, ago, kind, amount, unit, text in snapshot["happenings"]:
        size = format_bytes(amount) if unit == "bytes" else f"{amount:,} {unit}"
        yield Cell(-ago, f"{ago:,.0f} s"), _word(kind), Cell(amount, size), _word(text)


def _replicas(snapshot: Json) -> Iterator[Row]:
    for name, node, up, is_out, running, uncached, blocks, used, cells in snapshot["cluster"]["replicas"]:
        state = _word("takes nothing new" if is_out else "takes requests")
        counts = map(_number, (running, uncached, blocks, used, cells))
        yield _word(str(name)), _word(str(node)), _seconds(up), state, *counts


def _number(value: float | None) -> Cell:
    return Cell(-1.0, "–") if value is None else Cell(value, f"{value:,}")


def _bytes(value: int) -> Cell:
    return Cell(value, format_bytes(value) if value else "–")


def _seconds(value: float) -> Cell:
    return Cell(value, f"{value:,.1f} s")


def _word(value: str) -> Cell:
    return Cell(value, value)


_SEQUENCES = Sheet("Sequences", ("sequence", "state", "tokens", "shared", "idle for", "prefix"), _sequences, 2)
_PREFIXES = Sheet(
    "Prefixes",
    ("prefix", "parent", "tenant", "start", "tokens", "holders", "running", "hits", "cells saved", "idle for"),
    _prefixes,
    8,
)
_PREFIXES_OF_ALL = Sheet("Prefixes", (*_PREFIXES.columns, "replica"), _prefixes_of_all, 8)
_OTHERS = (
    Sheet("Tenants", ("tenant", "cells", "shared", "sequences", "tokens hit", "tokens missed", "hit ratio"), _tenants, 4),
    Sheet(
        "Tiers",
        ("tier", "holds", "budget", "written", "read", "blocks", "tokens hit", "blocks evicted", "errors"),
        _tiers,
        1,
    ),
    Sheet("Events", ("ago", "what", "amount", "in words"), _events, 0),
)
_REPLICAS = Sheet(
    "Replicas",
    ("replica", "node", "up for", "state", "running", "tokens to compute", "known blocks", "cells used", "cells"),
    _replicas,
    4,
)
