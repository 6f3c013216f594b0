"""Which weights a model computes with: the file's own, or a copy of them written out as f16.

llama.cpp multiplies a quantised weight by unpacking it for every few tokens, and rounds the activations to eight bits on the
way. For one person that is the best a CPU can do: it waits for memory, and packed weights are the fewest bytes. With many
people in a step it is the multiplying that everybody waits for, and most quantisations have no kernel that is as good at it as
the one for f16. So the file may be written out once (two bytes a parameter, by the library's own converter) and the copy loaded
in its place: the same function, with less rounding. What that brings is measured (`engine.weighing`), not assumed.

Copies lie in the user's cache folder, one a file, under a name that says which file's and by which library. One process makes
one at a time; it is made beside its name, written through to the disk and renamed, so none is ever half there. Those that
nobody has loaded for a month are removed when a new one is made.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from pasture.core.errors import ModelError
from pasture.core.values import Weights
from pasture.engine import bindings, trial, usercache
from pasture.engine.bindings import lib
from pasture.engine.fingerprint import content_id
from pasture.engine.gguf_header import GgufHeader, model_files, read_header
from pasture.engine.settings import EngineSettings, default_threads

logger = logging.getLogger(__name__)

_MOSTLY_F16 = 1
"""LLAMA_FTYPE_MOSTLY_F16"""
_PARAMETER_BYTES = 2
_UNUSED_SECONDS = 30 * 86400.0
_MAKING = "making-"


def expanded_bytes(path: Path) -> int | None:
    """What the copy takes, about; None for a file without quantised weights, of which there is none."""
    headers = [read_header(part) for part in model_files(path)]
    return _PARAMETER_BYTES * sum(header.n_params for header in headers) if any(map(_is_quantised, headers)) else None


def loaded_file(settings: EngineSettings) -> Path:
    """The file to load for these settings. Makes the copy where there is none yet; raises ModelError where that fails."""
    path = Path(settings.model_path)
    needed = expanded_bytes(path) if settings.weights is Weights.F16 else None
    if needed is None:
        return path
    copy = _copy_of(path)
    if not _is_whole(copy, needed):
        try:
            with usercache.alone(copy.parent):
                if not _is_whole(copy, needed):  # another process may have made it meanwhile
                    _make(path, copy, needed)
        except OSError as error:
            raise ModelError(f"{path} cannot be written out as f16 to {copy.parent}: {error.strerror}") from error
    with suppress(OSError):
        os.utime(copy)
    return copy


def have_copy(settings: EngineSettings) -> None:
    """Make the copy in a child process, where there is none yet: a converter that crashes ends nothing else.

    Raises ModelError where that fails.
    """
    path = Path(settings.model_path)
    needed = expanded_bytes(path)
    if needed is None or _is_whole(_copy_of(path), needed):
        return
    logger.info("writing %s out as f16", path)
    try:
        answer = trial.run(
            "pasture.engine.weights", replace(settings, weights=Weights.F16), trial.file_bytes(settings) + 4 * needed
        )
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"{path} could not be written out as f16 in {error.timeout:.0f} s") from error
    if isinstance(answer, trial.Death):
        raise ModelError(f"{path} cannot be written out as f16: {answer.reason}")


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
    marks = (*map(content_id, model_files(path)), *(part.stat().st_mtime_ns for part in model_files(path)), bindings.VERSION)
    return usercache.directory() / "weights" / f"{sha256(repr(marks).encode()).hexdigest()[:32]}-f16.gguf"


def _is_whole(copy: Path, needed: int) -> bool:
    """Whether a copy is there, and the disk has not lost its end."""
    try:
        return read_header(copy).file_bytes >= needed
    except ModelError:
        return False


def _make(path: Path, copy: Path, needed: int) -> None:
    """Under the folder's lock."""
    _remove_unused(copy.parent)
    free = shutil.disk_usage(copy.parent).free
    if free < needed:
        raise ModelError(f"{path} written out as f16 takes {needed} bytes; {copy.parent} has {free} left")
    with tempfile.TemporaryDirectory(dir=copy.parent, prefix=_MAKING) as folder:
        made = Path(folder) / "f16.gguf"
        expand_weights(path, made)
        if not _is_whole(made, needed):
            raise ModelError(f"{path} cannot be written out as f16: some of its weights stay as they are")
        _sync(made)
        made.replace(copy)
        _sync(copy.parent)
    logger.info("the weights of %s are written out as f16 to %s", path, copy)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_unused(folder: Path) -> None:
    """Copies that nobody has loaded for long, and what a process left that was killed while it made one."""
    oldest = time.time() - _UNUSED_SECONDS
    for entry in folder.iterdir():
        with suppress(OSError):
            if entry.name.startswith(_MAKING):
                shutil.rmtree(entry)
            elif entry.stat().st_mtime < oldest:
                entry.unlink()


if __name__ == "__main__":
    trial.serve(lambda settings: {"path": str(loaded_file(settings))})
