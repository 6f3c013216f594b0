"""Where what belongs together was sent last: a bounded memory from a key to a replica, in one of its epochs.

The least recently sent is forgotten first. Knows no loads and judges nothing; pure, one thread.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

from pasture.cluster.values import Epoch, ReplicaId

Key = TypeVar("Key")


class Homes(Generic[Key]):
    def __init__(self, n_max: int) -> None:
        self._n_max = n_max
        self._homes: OrderedDict[Key, tuple[ReplicaId, Epoch]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._homes)

    def sent(self, key: Key, replica: ReplicaId, epoch: Epoch) -> None:
        self._homes[key] = (replica, epoch)
        self._homes.move_to_end(key)
        if len(self._homes) > self._n_max:
            self._homes.popitem(last=False)

    def find(self, key: Key | None) -> tuple[ReplicaId, Epoch] | None:
        """None for a key that is not known, and for None."""
        return None if key is None else self._homes.get(key)
