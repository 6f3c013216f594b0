"""The RAM tier's books: bytes in all, in each form and pinned, and what came of looking.

Invariant: `bytes` is the sum of the sizes of the entries that have entered and not left. The tier's lock is held around every
call. Knows no budget and no order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from pasture.core.storage import TierStatistics
from pasture.core.values import Form
from pasture.tiers.entries import Entry


class Books:
    def __init__(self) -> None:
        self.bytes = 0
        self.pinned_bytes = 0
        self.gone_bytes = 0
        """that have left from the beginning on, in larger forms of what is still here too"""
        self.hit_tokens = 0
        self.missed_tokens = 0
        self.read_bytes = 0
        self.written_bytes = 0
        self.evicted_blocks = 0
        self.damaged_blocks = 0
        self._by_form: Counter[Form] = Counter()

    def enter(self, entry: Entry) -> None:
        """It is in RAM, as it is now."""
        self._add(entry, entry.size)

    def leave(self, entry: Entry) -> None:
        """It is not, or not as it was."""
        self.gone_bytes += entry.size
        self._add(entry, -entry.size)

    def pin(self, entry: Entry) -> None:
        if not entry.pins:
            self.pinned_bytes += entry.size
        entry.pins += 1

    def unpin(self, entry: Entry) -> bool:
        """Whether nobody holds it any more, and it is still there."""
        entry.pins -= 1
        if entry.pins or entry.gone:
            return False
        self.pinned_bytes -= entry.size
        return True

    def agree(self, entries: Collection[Entry]) -> dict[str, bool]:
        """Which sums are what these entries come to; they should all be."""
        n_bytes = sum(entry.size for entry in entries)
        return {
            "bytes": self.bytes == n_bytes,
            "bytes by form": sum(self._by_form.values()) == n_bytes,
            "pinned bytes": self.pinned_bytes == sum(entry.size for entry in entries if entry.pins),
        }

    def statistics(
        self,
        *,
        blocks: int,
        budget_bytes: int,
        in_flight_bytes: int,
        errors: int,
        latency_seconds: float,
        bytes_per_second: float,
    ) -> TierStatistics:
        return TierStatistics(
            name="ram",
            blocks=blocks,
            bytes=self.bytes,
            budget_bytes=budget_bytes,
            pinned_bytes=self.pinned_bytes,
            in_flight_bytes=in_flight_bytes,
            bytes_by_form={form: n_bytes for form, n_bytes in self._by_form.items() if n_bytes},
            hit_tokens=self.hit_tokens,
            missed_tokens=self.missed_tokens,
            written_bytes=self.written_bytes,
            read_bytes=self.read_bytes,
            evicted_blocks=self.evicted_blocks,
            damaged_blocks=self.damaged_blocks,
            errors=errors,
            latency_seconds=latency_seconds,
            bytes_per_second=bytes_per_second,
        )

    def _add(self, entry: Entry, n_bytes: int) -> None:
        self.bytes += n_bytes
        self._by_form[entry.block.form] += n_bytes
        if entry.pins:
            self.pinned_bytes += n_bytes
