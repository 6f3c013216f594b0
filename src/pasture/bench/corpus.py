"""Real text that every machine has: Python's own help topics, as prose of a wanted length.

Owns the reading of `pydoc_data.topics` (about 460,000 characters) and the rule of thumb between characters and tokens. The
text differs a little between Python versions, so results compare within one run, not across interpreters. Pure; any thread.
"""

from __future__ import annotations

import re
from functools import cache
from pydoc_data.topics import topics as _topics
from random import Random

CHARACTERS_PER_TOKEN = 3.9
"""of this text with the SmolLM2 vocabulary"""

_MARKUP = re.compile(r"\n[*=\-~]{4,}\n")
_BLANK = re.compile(r"\s+")


@cache
def subjects() -> tuple[str, ...]:
    """Names of topics short enough to be asked about in a sentence, sorted."""
    return tuple(sorted(name for name in _topics if name.isalpha()))


@cache
def paragraphs() -> tuple[str, ...]:
    """Every paragraph of prose, white space folded, in the order of the topics' names."""
    found = []
    for name in sorted(_topics):
        for raw in _MARKUP.sub("\n\n", _topics[name]).split("\n\n"):
            text = _BLANK.sub(" ", raw).strip()
            if len(text) >= 80:
                found.append(text)
    return tuple(found)


def passage(rng: Random, n_tokens: int) -> str:
    """Consecutive paragraphs of about `n_tokens` tokens, from a place that `rng` draws; cut at a word."""
    wanted = int(n_tokens * CHARACTERS_PER_TOKEN)
    source = paragraphs()
    position = rng.randrange(len(source))
    taken: list[str] = []
    length = 0
    while length < wanted:
        text = source[position % len(source)]
        taken.append(text)
        length += len(text) + 2
        position += 1
    return "\n\n".join(taken)[:wanted].rsplit(" ", 1)[0]
