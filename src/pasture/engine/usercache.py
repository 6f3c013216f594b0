"""What can be found out or made again, kept for this user: answers about this machine, and files that were derived.

An answer is a small JSON file under a hash of its question, so another machine, library or model asks another one. Writing is
best effort: what cannot be kept costs the next start a few seconds. `alone` keeps processes that start at the same moment from
finding out, or making, the same thing at the same time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_HEAD_BYTES = 1 << 20


def directory() -> Path:
    """The folder; it may not exist yet."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "pasture"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pasture"


def answer_file(kind: str, question: tuple[object, ...]) -> Path:
    """Where the answer to a question of this kind lies."""
    return directory() / kind / f"{hashlib.sha256(repr(question).encode()).hexdigest()[:32]}.json"


def model_mark(path: Path) -> tuple[object, ...]:
    """What tells a model file from what was under its name before, without reading all of it."""
    stat = path.stat()
    with path.open("rb") as file:
        head = hashlib.sha256(file.read(_HEAD_BYTES)).hexdigest()
    return (stat.st_size, stat.st_mtime_ns, head)


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def recall(path: Path) -> dict[str, Any]:
    """The kept answer; empty when there is none or the file is damaged."""
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def remember(path: Path, answer: Mapping[str, object]) -> None:
    """Keep an answer, if that can be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(answer, file)
        os.replace(file.name, path)
    except OSError as error:
        logger.info("what was found out cannot be kept in %s: %s", path, error)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process of this user at a time, for the folder. Raises OSError where it cannot be made."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
