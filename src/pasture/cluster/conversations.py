"""The conversations that a replica has answered lately, by their tokens: what has to be carried when it is drained.

A conversation that goes on replaces what it was before; the ones that nobody has continued for longest are forgotten beyond a
budget of tokens. Tokens only: where their KV is, and whether it still is, its service knows. One thread.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from pasture.core.storage import BLOCK_TOKENS, BlockKey
from pasture.core.values import Namespace
from pasture.tiers.keys import chain, root_key

BUDGET_TOKENS = 8 << 20


@dataclass(frozen=True, slots=True)
class Conversation:
    namespace: Namespace
    tokens: array[int]
    session: str | None = None
    """what routers know it by"""


class Conversations:
    def __init__(self, fingerprint: bytes, budget_tokens: int = BUDGET_TOKENS) -> None:
        self._fingerprint = fingerprint
        self._budget_tokens = budget_tokens
        self._known: OrderedDict[tuple[BlockKey, bytes], Conversation] = OrderedDict()
        """(key of its last full block, the tokens behind that) -> it; the least recently used first"""
        self._behind: dict[BlockKey, set[bytes]] = {}
        self._n_tokens = 0

    def __len__(self) -> int:
        return len(self._known)

    def note(self, namespace: Namespace, tokens: array[int], session: str | None = None) -> None:
        """It stands at these tokens now; whatever it began with is no conversation of its own any more."""
        n_full = len(tokens) // BLOCK_TOKENS
        root = root_key(self._fingerprint, namespace)
        keys = [root, *(address.key for address in chain(root, tokens[: n_full * BLOCK_TOKENS]))]
        for index, key in enumerate(keys):
            behind = tokens[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS].tobytes()
            for rest in [rest for rest in self._behind.get(key, ()) if behind.startswith(rest)]:
                self._forget((key, rest))
        name = (keys[-1], tokens[n_full * BLOCK_TOKENS :].tobytes())
        self._known[name] = Conversation(namespace, tokens, session)
        self._behind.setdefault(keys[-1], set()).add(name[1])
        self._n_tokens += len(tokens)
        while self._n_tokens > self._budget_tokens and len(self._known) > 1:
            self._forget(next(iter(self._known)))

    def latest_first(self) -> Iterator[Conversation]:
        return iter(list(reversed(self._known.values())))

    def _forget(self, name: tuple[BlockKey, bytes]) -> None:
        self._n_tokens -= len(self._known.pop(name).tokens)
        rests = self._behind[name[0]]
        rests.discard(name[1])
        if not rests:
            del self._behind[name[0]]
