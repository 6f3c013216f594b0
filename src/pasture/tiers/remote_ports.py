"""What a remote store is to the remote tier: names and bytes behind a connection.

A shelf is one store that answers or fails as a whole: one Redis server, a Redis cluster, a Mooncake pool. It may block, raise
anything, or hang; `Server` gives it threads and limits. It knows nothing of tokens, keys or secrets: names are what a `Wire`
made of keys, and a head is what a wire writes before the payload: header and tokens section.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pasture.core.storage import Bytes

FORMAT = 1
"""in every name: what another version of the format has written is not there, rather than damaged"""
CHILDREN = 8
"""heads behind one parent that are offered"""


class ShelfFull(Exception):
    """The store answers, and has no room."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What the store as a whole says of itself; zero where it says nothing."""

    blocks: int = 0
    bytes: int = 0
    budget_bytes: int = 0


class Shelf(Protocol):
    """Any thread, several at once; whatever is raised counts as a failure of the store, but for ShelfFull."""

    @property
    def address(self) -> str:
        """For people, without secrets."""
        ...

    @property
    def warnings(self) -> Sequence[str]:
        """What is not as it was asked for."""
        ...

    def open(self) -> None:
        """Connect. Called again after it failed; nothing else is called before it succeeded."""
        ...

    def ping(self) -> None:
        """The cheapest question that the store itself has to answer."""
        ...

    def usage(self) -> Usage: ...

    def stored(self, names: Sequence[bytes], before: Sequence[bytes]) -> Sequence[bool]:
        """Which names are there, in one question; counts as a use of them and of those `before`."""
        ...

    def read(self, names: Sequence[bytes]) -> Sequence[Bytes | None]:
        """Whole blocks, each in a buffer of its own."""
        ...

    def write(self, name: bytes, head: bytes, payload: Bytes) -> None:
        """A block, in two parts that follow one another. Raises ShelfFull."""
        ...

    def enlist(self, parent: bytes, head: bytes) -> None:
        """Remember that a block with this head stands behind `parent`. Raises ShelfFull."""
        ...

    def children(self, parents: Sequence[bytes]) -> Sequence[Sequence[bytes]]:
        """The heads that were enlisted behind each of `parents`; a few, the newest first. Their blocks may be gone."""
        ...

    def remove(self, name: bytes) -> None: ...

    def close(self) -> None:
        """While nothing else is being called; nothing is called after it."""
        ...
