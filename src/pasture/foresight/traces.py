"""Traces of real traffic as requests over chained blocks: the Mooncake format and coding sessions, plain or gzipped JSON lines.

    Mooncake           one request a line; `hash_ids` are chained ids of 512-token blocks; `timestamp` in milliseconds
    coding sessions    one session a line; its requests with 64-token block ids local to the session, as ranges; the n-th
                       session begins `session_seconds` after the one before it

What comes out is in order of time. Blocks of a coding session are joined to blocks of 512 tokens, whose id stands for the block
and everything before it, as in the other format. Raises ConfigError for a file that is neither.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from pasture.core.errors import ConfigError
from pasture.core.values import Kind

TRACE_BLOCK_TOKENS = 512
SESSION_SECONDS = 60.0

_Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request."""

    at: float
    """seconds since the trace began"""
    n_tokens: int
    """of its prompt"""
    blocks: tuple[int, ...]
    """chained ids of its prompt's blocks; the last may be short"""
    finished_at: float | None = None
    """when the reply ended, where the trace says so"""
    expects: Kind = Kind.CHAT
    """what the reply waits for"""
    n_reply_tokens: int = 0
    """of its reply"""


def read_trace(file: Path, *, session_seconds: float = SESSION_SECONDS) -> list[TraceRequest]:
    """All requests, in order of time."""
    try:
        with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
            rows = [json.loads(line) for line in lines if line.strip()]
        if not rows:
            raise ConfigError(f"{file} is empty")
        requests = list(_coding(rows, session_seconds) if "requests" in rows[0] else map(_mooncake, rows))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, EOFError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{file} is neither a Mooncake trace nor one of coding sessions: {error!r}") from error
    return sorted(requests, key=lambda request: request.at)


def _mooncake(row: _Fields) -> TraceRequest:
    blocks, n_reply = tuple(map(int, row["hash_ids"])), int(row.get("output_length", 0))
    return TraceRequest(float(row["timestamp"]) / 1000, int(row["input_length"]), blocks, n_reply_tokens=n_reply)


def _coding(rows: Sequence[_Fields], session_seconds: float) -> Iterator[TraceRequest]:
    ids: dict[tuple[int, tuple[int, ...]], int] = {}
    for number, row in enumerate(rows):
        per_block = TRACE_BLOCK_TOKENS // int(row["block_size"])

        def joined(ranges: Sequence[Sequence[int]], root: int = -1 - number, per_block: int = per_block) -> tuple[int, ...]:
            small = list(chain.from_iterable(range(first, last + 1) for first, last in ranges))
            blocks, before = [], root
            for start in range(0, len(small), per_block):
                before = ids.setdefault((before, tuple(small[start : start + per_block])), len(ids))
                blocks.append(before)
            return tuple(blocks)

        yield from _session(row["requests"], number * session_seconds, joined)


def _session(
    rows: Sequence[_Fields], began: float, joined: Callable[[Sequence[Sequence[int]]], tuple[int, ...]]
) -> Iterator[TraceRequest]:
    for row in rows:
        at = began + float(row["t"])
        if row["type"] == "subagent":
            yield from _session(row["requests"], at, joined)
            continue
        finished_at = at + float(row["api_time"]) if "api_time" in row else None
        expects = Kind.TOOL if row["stop"] == "tool_use" else Kind.CHAT
        yield TraceRequest(at, int(row["in"]), joined(row["hash_ranges"]), finished_at, expects, int(row.get("out", 0)))
