"""What follows a block, from the paths of earlier requests: reading ahead within a request, as file systems do within a file.

    asked for:    b0  b1  b2                    foreseen:  b3  b4  b5  b6 ...     (as far as one follower is the likely one)

A request's last block is short, and will be another one when its conversation goes on, so it is nobody's follower. Followers
are counted with a weight that halves with every other follower that comes; a chain is foreseen only while its next block has
more than half of the weight. Learns from the past only; a bounded number of blocks is remembered. One thread.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence

from pasture.core.storage import BlockKey

REMEMBERED_BLOCKS = 1 << 17
WINDOW = 64
"""blocks that are foreseen at a time"""
LIKELY = 0.5
"""share of a block's requests that went on the same way, above which the next one is expected to"""
FADE = 0.5
"""what is left of a follower's share when a request goes another way"""


class _Follower:
    __slots__ = ("key", "share")

    def __init__(self, key: BlockKey) -> None:
        self.key = key
        self.share = 1.0


class Paths:
    """What requests so far have gone through."""

    def __init__(self) -> None:
        self._followers: OrderedDict[BlockKey, _Follower] = OrderedDict()

    def learn(self, path: Sequence[BlockKey]) -> None:
        """A request has gone through these blocks."""
        followers = self._followers
        for index in range(len(path) - 2):
            key, following = path[index], path[index + 1]
            known = followers.get(key)
            if known is None:
                followers[key] = _Follower(following)
                continue
            followers.move_to_end(key)
            if known.key == following:
                known.share += (1 - known.share) * (1 - FADE)
            else:
                known.share *= FADE
                if known.share < LIKELY / 2:
                    followers[key] = _Follower(following)
                    followers[key].share = LIKELY
        while len(followers) > REMEMBERED_BLOCKS:
            followers.popitem(last=False)

    def after(self, key: BlockKey) -> BlockKey | None:
        """What will probably follow; None where nothing is likely."""
        known = self._followers.get(key)
        return known.key if known is not None and known.share > LIKELY else None


class Reading:
    """One request's blocks, asked for one after the other."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._foreseen: deque[BlockKey] = deque()

    def asked(self, key: BlockKey) -> Iterator[BlockKey]:
        """This block is asked for now; yields what is newly foreseen, nearest first."""
        foreseen = self._foreseen
        if foreseen and foreseen[0] == key:
            foreseen.popleft()
        else:
            foreseen.clear()
        last: BlockKey | None = foreseen[-1] if foreseen else key
        while len(foreseen) < WINDOW and last is not None and (last := self._paths.after(last)) is not None:
            foreseen.append(last)
            yield last
