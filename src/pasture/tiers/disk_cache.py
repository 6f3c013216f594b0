"""A cache directory as a whole: block files and their index, changed together.

A file comes before its row and a row goes before its file, so the index never promises what is not there; what a killed
process left between the two is put right by `settle`. Knows nothing of tokens, keys or secrets: blocks are names here. Other
processes may use the same directory at the same time. Any thread. Errors of the files pass through as OSError, those of the
index as IndexUnavailable.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from pasture.core.storage import Bytes
from pasture.tiers.disk_files import BlockFiles, FileFacts
from pasture.tiers.disk_index import DiskIndex, IndexUnavailable
from pasture.tiers.disk_rows import Guaranteed, Row, tick
from pasture.tiers.wire import BadBlock, Header, PlainWire, Wire, parts, read_header

NOTHING = -1
"""a target for `evict` that even empty blocks exceed"""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one file that was read from beginning to end."""

    name: bytes
    n_bytes: int
    damage: str | None = None
    """why it was taken away; None where nothing is wrong with it"""
    unreadable: str | None = None
    """why it could not be read, and stays"""
    opened: bool = False
    """its tokens were compared with its key; False for a block under another secret, whose checksum alone was"""


class DiskCache:
    """The cache in a directory that `private_directory` has approved. `clock` is monotonic, in seconds."""

    def __init__(self, directory: Path, clock: Callable[[], float] = monotonic) -> None:
        self.files = BlockFiles(directory)
        self.index = DiskIndex(self.files.root, self._contents, clock)

    def settle(self, now: float) -> None:
        """Put right what killed processes left: temporary files, files without rows or not worth one, rows without files."""
        self.files.sweep(now)
        known = self.index.sizes()  # first: what a neighbour writes and enters during the scan would count as gone
        facts = {fact.name: fact for fact in self.files.scan()}
        self.index.reconcile(known, {name: fact.n_bytes for name, fact in facts.items()}, lambda name: self._row(facts[name]))

    def add(self, head: bytes, payload: Bytes, now: float) -> None:
        """Store what a `Wire` has encoded; replaces what lies in its place."""
        header = read_header(head)
        self.files.write(header.name, head, payload)
        try:
            self.index.add(_row(header, head[-header.n_token_bytes :], now))
        except IndexUnavailable:
            self.files.remove(header.name)  # nobody would find it, and no budget would count it
            raise

    def discard(self, name: bytes) -> None:
        """Take a block away, or whatever lies in its place."""
        try:
            self.index.drop([name])
        finally:
            self.files.remove(name)

    def evict(self, target_bytes: int, *, guaranteed: Guaranteed = lambda owner: 0) -> list[Row]:
        """Take blocks away until at most `target_bytes` are left, least recently used first; see `DiskIndex.evict`."""
        return self._removed(self.index.evict(target_bytes, guaranteed=guaranteed))

    def expire(self, used_before: float, own: Mapping[bytes, float]) -> list[Row]:
        """Take away what was not used for too long; see `DiskIndex.expire`."""
        return self._removed(self.index.expire(used_before, own))

    def evict_owner(self, owner: bytes, target_bytes: int) -> list[Row]:
        """The same for what is on one account."""
        return self._removed(self.index.evict_owner(owner, target_bytes))

    def _removed(self, evicted: list[Row]) -> list[Row]:
        for row in evicted:
            self.files.remove(row.name)
        return evicted

    def clear(self) -> int:
        """Take every block away; how many."""
        names = {row.name for row in self.evict(NOTHING)}
        for fact in list(self.files.scan()):
            self.files.remove(fact.name)
            names.add(fact.name)
        return len(names)

    def verify(self, wire: Wire | None) -> Iterator[Verdict]:
        """Read every file, and take away those that are damaged. `wire` opens blocks that are encrypted.

        What the system cannot read stays: it may be a matter of permissions, or of the whole disk.
        """
        for fact in list(self.files.scan()):
            try:
                opened = self._check(fact.name, wire)
            except FileNotFoundError:
                continue
            except BadBlock as error:
                self.discard(fact.name)
                yield Verdict(fact.name, fact.n_bytes, damage=str(error))
            except OSError as error:
                yield Verdict(fact.name, fact.n_bytes, unreadable=error.strerror or str(error))
            else:
                yield Verdict(fact.name, fact.n_bytes, opened=opened)

    def close(self) -> None:
        self.index.close()

    def _check(self, name: bytes, wire: Wire | None) -> bool:
        """Whether the block could be opened. Raises BadBlock for a damaged one."""
        data = self.files.read(name)
        header, _, _ = parts(data)
        if not header.sealed:
            PlainWire().decode(data)
            return True
        if wire is None:
            return False
        try:
            wire.decode(data)
        except BadBlock:
            return False  # its checksum was right: it is somebody else's
        return True

    def _contents(self, known: Collection[bytes]) -> Iterator[Row]:
        """What the files say that have none of these names; stops early where they cannot be listed."""
        try:
            for fact in self.files.scan():
                if fact.name not in known and (row := self._row(fact)) is not None:
                    yield row
        except OSError:
            return

    def _row(self, fact: FileFacts) -> Row | None:
        """None for a file that cannot be read, or is no block; the latter is taken away, since no index would count it."""
        try:
            header, section = self.files.head(fact.name)
        except BadBlock:
            self.files.remove(fact.name)
            return None
        except OSError:
            return None
        return _row(header, section, fact.written)


def _row(header: Header, section: bytes, written: float) -> Row:
    return Row(
        name=header.name,
        parent=header.parent,
        p0=header.p0,
        p1=header.p1,
        form=header.form,
        whole=header.whole,
        sealed=header.sealed,
        n_bytes=header.n_bytes,
        tokens=section,
        written=written,
        last_used=tick(written),
        hits=0,
        owner=header.owner,
    )
