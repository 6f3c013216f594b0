"""What other versions of pasture left in a cache directory: `DIR/v1/` beside our own.

Its blocks are in a format that we do not read, so that it is in no index and no budget; it can be measured and removed. Only
what a cache is made of is counted and taken away: a foreign file stays, and the directories it is in. No link is followed.
Errors of the system pass through as OSError.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from pasture.tiers.disk_files import LAYOUT, SUFFIX, TEMPORARY

_VERSION = re.compile(r"v\d+")
_FOLDER = re.compile(r"[0-9a-f]{2}")
_BLOCK = re.compile(rf"[0-9a-f]{{64}}{re.escape(SUFFIX)}|{TEMPORARY}.*")
_INDEX = re.compile(rf"index-\d+\.sqlite(-wal|-shm|-journal)?|{TEMPORARY}.*")


def other_versions(directory: Path) -> Mapping[str, int]:
    """Their directories' names -> bytes of their files."""
    sizes = {}
    for root in _roots(directory):
        sizes[root.name] = 0
        for entry in _files(root):
            with suppress(FileNotFoundError):
                sizes[root.name] += entry.stat(follow_symlinks=False).st_size
    return sizes


def remove_other_versions(directory: Path) -> None:
    """Take them away, whether or not a server of such a version is running: to it, every block is a miss then."""
    for root in _roots(directory):
        for entry in _files(root):
            with suppress(FileNotFoundError):
                os.unlink(entry.path)
        for path in (*root.iterdir(), root):
            with suppress(OSError):  # what is no folder, or not empty
                os.rmdir(path)


def _roots(directory: Path) -> list[Path]:
    names = sorted(entry.name for entry in _listed(directory) if entry.is_dir(follow_symlinks=False))
    roots = [directory / name for name in names if _VERSION.fullmatch(name) and name != LAYOUT]
    return [root for root in roots if any(_files(root))]  # any other is no cache


def _files(root: Path) -> Iterator[os.DirEntry[str]]:
    """The cache's own; may be removed on the way."""
    for entry in _listed(root):
        if _INDEX.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
            yield entry
        elif _FOLDER.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            blocks = _listed(entry)
            yield from (block for block in blocks if _BLOCK.fullmatch(block.name) and block.is_file(follow_symlinks=False))


def _listed(directory: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    with os.scandir(directory) as entries:
        return list(entries)
