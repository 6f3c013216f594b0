"""Recorded traffic as a workload: a trace's arrivals, lengths and sharing, smaller and slower, as text that is shared alike.

    Mooncake           one request a line; `hash_ids` of 512-token blocks, each standing for the block and all before it
    coding sessions    one session a line; its requests with 64-token block ids of their own, as ranges; the n-th session
                       begins `--session-every` after the one before it

A trace holds no text. Every block id becomes the same words wherever it stands, about as many as the block has tokens times
`--scale`, so two prompts have a beginning in common exactly where their blocks have. Replies are generated for their length
alone: what a later prompt holds of them is the trace's block again, which every system computes anew. Requests are sent when
the trace says, `--speed` times as fast, whether or not earlier ones are answered. Pure values; any thread.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

from pasture.bench.options import BenchOptions
from pasture.core.errors import ConfigError

MOONCAKE_BLOCK_TOKENS = 512
_Fields = Mapping[str, Any]

# fmt: off
_WORDS = (
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state", "family",
    "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system", "program",
    "question", "work", "government", "number", "night", "point", "home", "water", "room", "mother", "area", "money", "story",
    "fact", "month", "lot", "right", "study", "book", "eye", "job", "word", "business", "issue", "side", "kind", "head",
    "house", "service", "friend", "father", "power", "hour", "game", "line", "end", "member", "law", "car", "city", "name",
    "team", "minute", "idea", "body", "back", "parent", "face", "level", "office", "door", "health", "person", "art", "war",
    "history", "party", "result", "change", "morning", "reason", "research", "girl", "moment", "air", "teacher", "force",
)
# fmt: on
"""each a single token, with the blank before it, in the vocabularies of most models"""


@dataclass(frozen=True, slots=True)
class Block:
    """A stretch of a prompt: equal identities are equal text."""

    identity: str
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Recorded:
    """One request of a trace, as it was."""

    at_seconds: float
    user: str
    blocks: tuple[Block, ...]
    reply_tokens: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request that is sent at its time, whatever came before it."""

    user: str
    at_seconds: float
    text: str
    prompt_tokens: int
    """about"""
    reply_tokens: int


def arrivals(options: BenchOptions) -> tuple[Arrival, ...]:
    """The first requests of the trace, scaled. Raises ConfigError for a file that is no trace."""
    if options.trace is None:
        raise ConfigError("trace needs a file: pasture bench trace FILE")
    found = sorted(read(options.trace, options.session_every), key=lambda request: request.at_seconds)[: options.requests]
    if not found:
        raise ConfigError(f"{options.trace} has no requests")
    return tuple(_scaled(request, found[0].at_seconds, options) for request in found)


def read(file: Path, session_seconds: float) -> Iterator[Recorded]:
    """Every request, in the order of the file. Raises ConfigError."""
    try:
        with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
            for number, line in enumerate(lines):
                row = json.loads(line)
                if "requests" in row:
                    began = number * session_seconds
                    yield from _session(row["requests"], began, f"session {number + 1}", int(row["block_size"]))
                else:
                    yield _mooncake(row, number)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, EOFError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{file} is neither a Mooncake trace nor one of coding sessions: {error!r}") from error


def text_of(block: Block, n_tokens: int) -> str:
    """The block's words, each with a blank before it; a shorter text is the beginning of a longer one."""
    rng = Random(block.identity)
    return "".join(f" {rng.choice(_WORDS)}" for _ in range(n_tokens))


def _scaled(request: Recorded, start: float, options: BenchOptions) -> Arrival:
    lengths = [max(1, round(block.n_tokens * options.scale)) for block in request.blocks]
    return Arrival(
        user=request.user,
        at_seconds=(request.at_seconds - start) / options.speed,
        text="".join(map(text_of, request.blocks, lengths)),
        prompt_tokens=sum(lengths),
        reply_tokens=max(1, round(request.reply_tokens * options.scale)),
    )


def _mooncake(row: _Fields, number: int) -> Recorded:
    blocks = _blocks([str(name) for name in row["hash_ids"]], int(row["input_length"]), MOONCAKE_BLOCK_TOKENS)
    return Recorded(float(row["timestamp"]) / 1000, f"request {number + 1}", blocks, int(row["output_length"]))


def _session(rows: Sequence[_Fields], began: float, name: str, block_tokens: int) -> Iterator[Recorded]:
    for row in rows:
        at = began + float(row["t"])
        if row["type"] == "subagent":
            yield from _session(row["requests"], at, name, block_tokens)
            continue
        ids = chain.from_iterable(range(first, last + 1) for first, last in row["hash_ranges"])
        blocks = _blocks([f"{name}: {number}" for number in ids], int(row["in"]), block_tokens)
        yield Recorded(at, name, blocks, int(row["out"]))


def _blocks(identities: Sequence[str], n_tokens: int, block_tokens: int) -> tuple[Block, ...]:
    """Whole blocks, and a last one for the rest."""
    lengths = [min(block_tokens, n_tokens - at) for at in range(0, len(identities) * block_tokens, block_tokens)]
    return tuple(Block(name, length) for name, length in zip(identities, lengths, strict=True) if length > 0)
