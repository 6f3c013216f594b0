"""Conversations of clients that name no session: known by their tokens, so that the next turn goes where the last one went.

The last full block of a conversation, with all before it, is one key; a prompt that has that key among its own goes on with it.
Two that part behind it are one session until they differ by a block, which costs nothing: both are best off in one place.
Bounded; pure; one thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from pasture.cluster.values import SessionKey
from pasture.core.storage import BlockKey
from pasture.core.values import RequestId

MAX_CONVERSATIONS = 100_000


class Continuing:
    def __init__(self, most: int = MAX_CONVERSATIONS) -> None:
        self._most = most
        self._sessions: OrderedDict[BlockKey, SessionKey] = OrderedDict()

    def session(self, path: Sequence[BlockKey], request: RequestId) -> SessionKey:
        """Of the longest conversation that the path goes on with; else a new one, named after the request."""
        found = next((self._sessions[key] for key in reversed(path) if key in self._sessions), None)
        return found if found is not None else SessionKey(f"\0{request}")

    def note(self, path: Sequence[BlockKey], session: SessionKey) -> None:
        """The conversation stands at this path now."""
        if not path:
            return
        self._sessions[path[-1]] = session
        self._sessions.move_to_end(path[-1])
        if len(self._sessions) > self._most:
            self._sessions.popitem(last=False)
