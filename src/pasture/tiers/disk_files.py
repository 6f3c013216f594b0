"""Block files in a private directory: `DIR/v2/ab/ab...64 hex digits.kv`, one block each, in the wire format.

A file appears complete or not at all: it is written under a temporary name beside its place and then moved there. It is not
flushed to the device: after a crash of the machine, not of the process, a file may be torn, which its checksum tells. No two
versions of the format meet, because each has its own subdirectory. Everything is private to the user (directories 0700, files
0600), nothing but regular files is opened, and links are not followed below DIR, which itself must belong to this user and be
writable by nobody else. Knows headers, but no index, no budget and no secret. Errors of the system pass through as OSError,
content as BadBlock; any thread, any number of processes.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from pasture.core.errors import ConfigError
from pasture.core.storage import Bytes
from pasture.tiers.pace import SHORTEST_SECONDS, Speed
from pasture.tiers.wire import HEADER_BYTES, VERSION, BadBlock, Header, read_header

LAYOUT = f"v{VERSION}"
SUFFIX = ".kv"
TEMPORARY = "writing-"
ABANDONED_SECONDS = 300.0
"""a temporary file this old belongs to a process that was killed"""
PROBE_BYTES = 4 << 20
USUAL = Speed(1e-4, 1e9)
"""assumed of a disk that cannot be probed because it cannot be written"""

_NAME = re.compile(r"[0-9a-f]{64}")
_OPEN = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


@dataclass(frozen=True, slots=True)
class FileFacts:
    """A block's file as its directory lists it."""

    name: bytes
    n_bytes: int
    written: float
    """seconds since the epoch"""


def private_directory(directory: Path) -> Path:
    """The directory, created if need be, resolved, and certain to be this user's alone to write. Raises ConfigError."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        resolved = directory.resolve(strict=True)
        facts = resolved.stat()
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"the cache directory {directory} cannot be used: {getattr(error, 'strerror', None) or error}"
        ) from None
    if hasattr(os, "geteuid"):
        if facts.st_uid != os.geteuid():
            raise ConfigError(
                f"the cache directory {directory} belongs to another user (uid {facts.st_uid}): use one of your own"
            )
        if facts.st_mode & 0o022:
            raise ConfigError(f"the cache directory {directory} can be written by others: chmod go-w it, or use another")
    return resolved


class BlockFiles:
    """All block files under one directory that `private_directory` has approved."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / LAYOUT
        self._root = str(self.root)

    def create(self) -> None:
        """Make sure that the root is there and private. Raises OSError."""
        with suppress(FileExistsError):
            os.mkdir(self._root, 0o700)
        facts = os.lstat(self._root)
        if not stat.S_ISDIR(facts.st_mode):
            raise NotADirectoryError(f"{self._root} is not a directory")
        if stat.S_IMODE(facts.st_mode) & 0o077:
            os.chmod(self._root, 0o700)

    def read(self, name: bytes) -> Bytes:
        """All bytes of a block's file, as long as its header says. Raises FileNotFoundError, OSError, BadBlock."""
        descriptor, size = self._open(name)
        try:
            header = self._header(descriptor, name, size)
            data = np.empty(header.n_bytes, np.uint8)
            _read_all(descriptor, data.data)
        finally:
            os.close(descriptor)
        return data

    def head(self, name: bytes) -> tuple[Header, bytes]:
        """Header and tokens section of a block's file; the checksum is not looked at. Raises like `read`."""
        descriptor, size = self._open(name)
        try:
            header = self._header(descriptor, name, size)
            data = bytearray(HEADER_BYTES + header.n_token_bytes)
            _read_all(descriptor, memoryview(data))
        finally:
            os.close(descriptor)
        return header, bytes(data[HEADER_BYTES:])

    def write(self, name: bytes, head: bytes, payload: Bytes) -> None:
        """Put a file in its place, in one instant for every reader. Raises OSError, and then leaves nothing behind."""
        folder = self._folder(name)
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        if not stat.S_ISDIR(os.lstat(folder).st_mode):
            os.unlink(folder)
            os.mkdir(folder, 0o700)
        temporary = os.path.join(folder, TEMPORARY + secrets.token_hex(8))
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPEN, 0o600)
        try:
            try:
                _write_all(descriptor, memoryview(head))
                _write_all(descriptor, payload.data)
            finally:
                os.close(descriptor)
            os.replace(temporary, self._path(name))
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise

    def exists(self, name: bytes) -> bool:
        """Whether something lies in the block's place."""
        return os.path.lexists(self._path(name))

    def remove(self, name: bytes) -> bool:
        """Take away what lies in the block's place; False when nothing did, or it would not go."""
        path = self._path(name)
        try:
            if not stat.S_ISDIR(os.lstat(self._folder(name)).st_mode):
                return False  # a foreign link, which may lead out of the directory
            if stat.S_ISDIR(os.lstat(path).st_mode):
                os.rmdir(path)  # a foreign directory goes if it is empty
            else:
                os.unlink(path)
        except OSError:
            return False
        return True

    def scan(self) -> Iterator[FileFacts]:
        """Every block file; what is neither a regular file nor named like a block is passed over. Raises OSError."""
        for entry in self._entries():
            stem = entry.name.removesuffix(SUFFIX)
            if stem == entry.name or not _NAME.fullmatch(stem) or os.path.basename(os.path.dirname(entry.path)) != stem[:2]:
                continue
            with suppress(FileNotFoundError):
                facts = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(facts.st_mode):
                    yield FileFacts(bytes.fromhex(stem), facts.st_size, facts.st_mtime)

    def sweep(self, now: float) -> int:
        """Remove the temporary files of killed processes; `now` in seconds since the epoch. Raises OSError."""
        swept = 0
        for entry in self._entries():
            if entry.name.startswith(TEMPORARY):
                with suppress(FileNotFoundError):
                    if now - entry.stat(follow_symlinks=False).st_mtime > ABANDONED_SECONDS:
                        os.unlink(entry.path)
                        swept += 1
        return swept

    def probe(self) -> Speed:
        """The speed of reading back a small file that was just written. Raises OSError."""
        path = os.path.join(self._root, TEMPORARY + secrets.token_hex(8))
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN, 0o600)
        try:
            _write_all(descriptor, np.ones(PROBE_BYTES, np.uint8).data)
            os.lseek(descriptor, 0, os.SEEK_SET)
            buffer = np.ones(PROBE_BYTES, np.uint8).data
            begin = perf_counter()
            _read_all(descriptor, buffer[:HEADER_BYTES])
            small = perf_counter()
            _read_all(descriptor, buffer[HEADER_BYTES:])
            large = perf_counter()
        finally:
            os.close(descriptor)
            with suppress(OSError):
                os.unlink(path)
        return Speed(max(small - begin, SHORTEST_SECONDS), PROBE_BYTES / max(large - small, SHORTEST_SECONDS))

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        with os.scandir(self._root) as folders:
            for folder in folders:
                if folder.is_dir(follow_symlinks=False):
                    with os.scandir(folder.path) as entries:
                        yield from entries
                elif folder.name.startswith(TEMPORARY):
                    yield folder

    def _open(self, name: bytes) -> tuple[int, int]:
        """Descriptor and size of a regular file that is reached without following a link."""
        path = self._path(name)
        if not (stat.S_ISDIR(os.lstat(self._folder(name)).st_mode) and stat.S_ISREG(os.lstat(path).st_mode)):
            raise BadBlock("it is not a file")
        descriptor = os.open(path, os.O_RDONLY | _OPEN)
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            os.close(descriptor)
            raise BadBlock("it is not a file")
        return descriptor, facts.st_size

    def _header(self, descriptor: int, name: bytes, size: int) -> Header:
        """The header, if the file is what it says; the descriptor is then at the beginning again."""
        head = bytearray(min(HEADER_BYTES, size))
        _read_all(descriptor, memoryview(head))
        os.lseek(descriptor, 0, os.SEEK_SET)
        header = read_header(bytes(head))
        if header.n_bytes != size:
            raise BadBlock(f"{size} bytes instead of {header.n_bytes}")
        if header.name != name:
            raise BadBlock("it is another block's")
        return header

    def _folder(self, name: bytes) -> str:
        return os.path.join(self._root, name[:1].hex())

    def _path(self, name: bytes) -> str:
        text = name.hex()
        return os.path.join(self._root, text[:2], text + SUFFIX)


def _read_all(descriptor: int, target: memoryview) -> None:
    while target:
        n_bytes = os.readv(descriptor, [target]) if hasattr(os, "readv") else _read_some(descriptor, target)
        if n_bytes == 0:
            raise BadBlock("it ends early")
        target = target[n_bytes:]


def _read_some(descriptor: int, target: memoryview) -> int:
    """For systems without `readv`."""
    some = os.read(descriptor, min(len(target), 1 << 24))
    target[: len(some)] = some
    return len(some)


def _write_all(descriptor: int, source: memoryview) -> None:
    while source:
        source = source[os.write(descriptor, source) :]
