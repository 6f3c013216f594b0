"""Which weights a model computes with: the file's own, or a copy of them written out as f16.

llama.cpp multiplies a quantised weight by unpacking it for every few tokens, and rounds the activations to eight bits on the
way. For one person that is the best a CPU can do: it waits for memory, and packed weights are the fewest bytes. With many
people in a step it is the multiplying that everybody waits for, and most quantisations have no kernel that is as good at it as
the one for f16. So the file may be written out once (two bytes a parameter, by the library's own converter) and the copy loaded
in its place: the same function, with less rounding. What that brings is measured (`engine.selfcheck`), not assumed.

Copies lie in the user's cache folder, one a file, under a name that says which file's and by which library. They are made
beside their name and renamed, so that none is ever half there, and those that nobody has loaded for a month are removed when a
new one is made.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from pasture.core.errors import ModelError
from pasture.core.values import Weights
from pasture.engine import bindings
from pasture.engine.bindings import lib
from pasture.engine.fingerprint import content_id, model_files
from pasture.engine.gguf_header import GgufHeader, read_header
from pasture.engine.settings import EngineSettings, default_threads

logger = logging.getLogger(__name__)

_MOSTLY_F16 = 1
"""LLAMA_FTYPE_MOSTLY_F16"""
_PARAMETER_BYTES = 2
_WORTH_TRYING_BYTES = 2 << 30
"""a larger copy is made only when it is asked for: it takes long, and who is alone waits for memory"""
_MEMORY_SHARE = 0.25
"""of the free memory, for a copy that nobody asked for"""
_UNUSED_SECONDS = 30 * 86400.0


def cache_directory() -> Path:
    """Where what can be made again is kept for this user."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "pasture"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pasture"


def worth_trying(path: str | Path, available_bytes: int) -> bool:
    """Whether a copy of this file is small enough, and different enough, that measuring what it brings makes sense."""
    n_bytes = expanded_bytes(Path(path))
    return n_bytes is not None and n_bytes <= min(_WORTH_TRYING_BYTES, _MEMORY_SHARE * available_bytes)


def expanded_bytes(path: Path) -> int | None:
    """What the copy takes; None for a file without quantised weights, of which there is none."""
    headers = [read_header(part) for part in model_files(path)]
    return _PARAMETER_BYTES * sum(header.n_params for header in headers) if any(map(_is_quantised, headers)) else None


def loaded_file(settings: EngineSettings) -> Path:
    """The file to load for these settings. Makes the copy where there is none yet; raises ModelError where that fails."""
    path = Path(settings.model_path)
    if settings.weights is not Weights.F16 or expanded_bytes(path) is None:
        return path
    copy = _copy_of(path)
    if _is_whole(copy, path):
        with suppress(OSError):
            os.utime(copy)
        return copy
    return _make(path, copy)


def expand_weights(source: Path, target: Path) -> None:
    """Write `source` with f16 weights to `target`: two bytes a parameter. Raises ModelError where that cannot be done."""
    read_header(source)
    bindings.initialise()
    params = lib.llama_model_quantize_default_params()
    params.ftype = _MOSTLY_F16
    params.allow_requantize = True
    params.nthread = default_threads()
    with bindings.library_log.errors() as reasons:
        failed = int(lib.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)))
    if failed:
        target.unlink(missing_ok=True)
        raise ModelError(f"{source} cannot be written as f16: {reasons[0] if reasons else 'the library gave no reason'}")


def _is_quantised(header: GgufHeader) -> bool:
    return not header.tensor_types <= bindings.PLAIN_TYPES


def _copy_of(path: Path) -> Path:
    question = (*map(content_id, model_files(path)), bindings.VERSION.encode())
    return cache_directory() / "weights" / f"{sha256(b'/'.join(question)).hexdigest()[:32]}-f16.gguf"


def _is_whole(copy: Path, path: Path) -> bool:
    """Whether a copy is there, and the disk has not lost a part of it."""
    try:
        header = read_header(copy)
    except ModelError:
        return False
    return header.file_bytes >= (expanded_bytes(path) or 0)


def _make(path: Path, copy: Path) -> Path:
    needed = expanded_bytes(path) or 0
    try:
        copy.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _remove_unused(copy.parent)
        free = shutil.disk_usage(copy.parent).free
        if free < needed:
            raise ModelError(f"{path} written out as f16 takes {needed} bytes; {copy.parent} has {free} left")
        with tempfile.TemporaryDirectory(dir=copy.parent, prefix="making-") as folder:
            made = Path(folder) / "f16.gguf"
            expand_weights(path, made)
            made.replace(copy)
    except OSError as error:
        raise ModelError(f"{path} cannot be written out as f16 to {copy.parent}: {error.strerror}") from error
    logger.info("the weights of %s are written out as f16 to %s", path, copy)
    return copy


def _remove_unused(folder: Path) -> None:
    oldest = time.time() - _UNUSED_SECONDS
    for entry in folder.iterdir():
        with suppress(OSError):
            if entry.stat().st_mtime < oldest:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
