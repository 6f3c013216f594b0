"""What the control groups of this process leave it of memory: systemd's MemoryMax, Slurm, containers.

A limit binds everything below it, so the groups of the path in `/proc/self/cgroup` count, and all above them, up to what is
mounted: inside a container that may be a group other than the machine's root, and the path one that only the host can see.
Version 2 has one tree, version 1 one for memory alone; a machine can have both. Linux; anywhere else there is nothing to read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True, slots=True)
class _Files:
    """What a version calls its files; the cache is that of a group and of all below it, in bytes."""

    limit: str
    used: str
    cache: str


_VERSION_1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _Files("memory.max", "memory.current", "inactive_file")


def bytes_left(root: Path = Path("/")) -> int | None:
    """What this process can take before one of its groups is full, the page cache that would give way counted as free.

    None: no group has a limit. `root`: of the file system, another one in tests.
    """
    mount = root / "sys/fs/cgroup"
    left = [
        group_left
        for tree, files, path in _memberships(root / "proc/self/cgroup", mount)
        for group in _with_all_above(path)
        if (group_left := _left_of(tree / group, files)) is not None
    ]
    return max(0, min(left)) if left else None


def _memberships(listing: Path, mount: Path) -> Iterator[tuple[Path, _Files, PurePosixPath]]:
    """Where each tree that may limit memory is mounted, and the path of this process's group in it."""
    paths = {controllers: path for _, controllers, path in _rows(listing)}
    of_memory = next((path for controllers, path in paths.items() if "memory" in controllers.split(",")), "/")
    yield mount, _VERSION_2, _inside(paths.get("", "/"))
    yield mount / "memory", _VERSION_1, _inside(of_memory)


def _rows(listing: Path) -> Iterator[tuple[str, str, str]]:
    """Number, controllers and path of every tree."""
    for line in _text(listing).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        yield number, controllers, path


def _inside(path: str) -> PurePosixPath:
    """Below the mount; the mount itself for a group outside of what this process can see."""
    parts = PurePosixPath(path).parts[1:]
    return PurePosixPath() if ".." in parts else PurePosixPath(*parts)


def _with_all_above(path: PurePosixPath) -> Iterator[PurePosixPath]:
    yield path
    yield from path.parents


def _left_of(group: Path, files: _Files) -> int | None:
    """None without a limit, and where there is no such group."""
    limit, used = _text(group / files.limit).strip(), _text(group / files.used).strip()
    if not (limit.isdigit() and used.isdigit()):
        return None
    statistics = dict(line.split(" ", 1) for line in _text(group / "memory.stat").splitlines() if " " in line)
    return int(limit) - int(used) + int(statistics.get(files.cache, "0"))


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
