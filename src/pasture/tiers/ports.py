"""What stands behind RAM: a tier that takes its time, be it a disk or a store that other machines share.

A tier never raises and never answers late: what goes wrong is a miss, with one warning. It looks after its own troubles, and
says with `accepts` when it wants to be left alone for a while.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol, runtime_checkable

from pasture.core.storage import BlockKey, TierStatistics
from pasture.core.values import Allowance
from pasture.tiers.block import Block
from pasture.tiers.keys import Address


@runtime_checkable
class KeepsAccounts(Protocol):
    """A slow tier that gives every owner what it may have and is guaranteed."""

    def allow(self, owner: BlockKey, allowance: Allowance) -> None:
        """The owner asks for something, under these terms. Any thread; at once."""
        ...


class SlowTier(Protocol):
    """Called from background threads only, several at once."""

    @property
    def name(self) -> str: ...

    @property
    def batch_bytes(self) -> int:
        """How much to ask for in one `get_batch`, at least a block; more pays where each question costs a round trip."""
        ...

    @property
    def accepts(self) -> bool:
        """Whether `put` would try; False for some time after failures. Any thread; at once."""
        ...

    def stored(self, path: Sequence[Address], before: Sequence[Address] = (), *, use: bool = True) -> Sequence[bool]:
        """Which of these addresses are stored: one batched question, with `use` one that counts as a use of those that are.

        `before`: what leads up to them and is in use as well, so that it is not evicted under them.
        """
        ...

    def following(self, parents: Sequence[BlockKey]) -> Sequence[Sequence[tuple[Address, array[int]]]]:
        """Blocks and checkpoints stored right behind each of `parents`, with their tokens; a few at most, last used first.

        One batched question.
        """
        ...

    def get_batch(self, addresses: Sequence[Address], timeout_seconds: float) -> Sequence[Block | None]:
        """The blocks, verified: header, lengths, checksum, address. None for what is not there, is not what it claims, or
        is not here in time; a tier that cannot bound its time may take longer."""
        ...

    def put(self, block: Block) -> bool:
        """Store it durably; replaces nothing (equal keys hold equal content), evicts others where the budget needs it.

        False when it should be offered again.
        """
        ...

    def remove(self, key: BlockKey) -> None: ...

    def statistics(self) -> TierStatistics: ...

    def close(self) -> None: ...


@runtime_checkable
class Expires(Protocol):
    """A tier that can drop what nobody has used for so long; others see to that by themselves."""

    def expire(self, unused_seconds: float, own_seconds: Mapping[BlockKey, float], in_use: Collection[BlockKey]) -> None:
        """`own_seconds`: of owners whose blocks are kept for another time; `in_use`: blocks that somebody holds in RAM."""
        ...
