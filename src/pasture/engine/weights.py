"""Which weights a model computes with: the file's own, or a copy of them written out, two bytes a parameter.

llama.cpp multiplies a quantised weight by unpacking it for every few tokens, and rounds the activations to eight bits on the
way. For one person that is the best a CPU can do: it waits for memory, and packed weights are the fewest bytes. With many
people in a step it is the multiplying that everybody waits for, and most quantisations have no kernel that is as good at it as
the one for f16, or for bf16 on a CPU that has an instruction for it. So the file may be written out once (by the library's own
converter) and the copy loaded in its place: the same function, with less rounding. That holds for bf16 too: it rounds each
weight and activation to eight bits of its own, where quantised activations share one scale between 32. What a copy brings is
measured (`engine.weighing`), not assumed.

Copies lie in the user's cache folder, one a file and form, under a name that says which file's and by which library. One
process makes one at a time; it is made beside its name, written through to the disk and renamed, so none is ever half there.
Those that nobody has loaded for a month are removed when a new one is made.
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

_FILE_TYPES = {Weights.F16: 1, Weights.BF16: 32}
"""LLAMA_FTYPE_MOSTLY_F16 and _BF16"""
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
    needed = expanded_bytes(path) if settings.weights.is_copy else None
    if needed is None:
        return path
    copy = _copy_of(path, settings.weights)
    if not _is_whole(copy, needed):
        try:
            with usercache.alone(copy.parent):
                if not _is_whole(copy, needed):  # another process may have made it meanwhile
                    _make(path, copy, settings.weights, needed)
        except OSError as error:
            raise ModelError(
                f"{path} cannot be written out as {settings.weights} to {copy.parent}: {error.strerror}"
            ) from error
    with suppress(OSError):
        os.utime(copy)
    return copy


def have_copy(settings: EngineSettings) -> bool:
    """Make the copy that these settings load in a child process, where there is none yet: a converter may crash.

    Whether it was made. Raises ModelError where that fails.
    """
    path = Path(settings.model_path)
    needed = expanded_bytes(path)
    if needed is None or _is_whole(_copy_of(path, settings.weights), needed):
        return False
    logger.info("writing %s out as %s", path, settings.weights)
    try:
        answer = trial.run("pasture.engine.weights", settings, trial.file_bytes(settings) + 4 * needed)
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"{path} could not be written out as {settings.weights} in {error.timeout:.0f} s") from error
    if isinstance(answer, trial.Death):
        raise ModelError(f"{path} cannot be written out as {settings.weights}: {answer.reason}")
    return True


def remove_copy(settings: EngineSettings) -> None:
    """Who has it loaded keeps it until they end."""
    _copy_of(Path(settings.model_path), settings.weights).unlink(missing_ok=True)


def expand_weights(source: Path, target: Path, weights: Weights) -> None:
    """Write `source` with F16 or BF16 weights to `target`. Raises ModelError where that cannot be done."""
    read_header(source)
    bindings.initialise()
    params = lib.llama_model_quantize_default_params()
    params.ftype = _FILE_TYPES[weights]
    params.allow_requantize = True
    params.nthread = default_threads()
    with bindings.library_log.errors() as reasons:
        failed = int(lib.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)))
    if failed:
        target.unlink(missing_ok=True)
        reason = reasons[0] if reasons else "the library gave no reason"
        raise ModelError(f"{source} cannot be written as {weights}: {reason}")


def _is_quantised(header: GgufHeader) -> bool:
    return not header.tensor_types <= bindings.PLAIN_TYPES


def _copy_of(path: Path, weights: Weights) -> Path:
    marks = (*map(content_id, model_files(path)), *(part.stat().st_mtime_ns for part in model_files(path)), bindings.VERSION)
    return usercache.directory() / "weights" / f"{sha256(repr(marks).encode()).hexdigest()[:32]}-{weights}.gguf"


def _is_whole(copy: Path, needed: int) -> bool:
    """Whether a copy is there, and the disk has not lost its end."""
    try:
        return read_header(copy).file_bytes >= needed
    except ModelError:
        return False


def _make(path: Path, copy: Path, weights: Weights, needed: int) -> None:
    """Under the folder's lock."""
    _remove_unused(copy.parent)
    free = shutil.disk_usage(copy.parent).free
    if free < needed:
        raise ModelError(f"{path} written out as {weights} takes {needed} bytes; {copy.parent} has {free} left")
    with tempfile.TemporaryDirectory(dir=copy.parent, prefix=_MAKING) as folder:
        made = Path(folder) / copy.name
        expand_weights(path, made, weights)
        if not _is_whole(made, needed):
            raise ModelError(f"{path} cannot be written out as {weights}: some of its weights stay as they are")
        _sync(made)
        made.replace(copy)
        _sync(copy.parent)
    logger.info("the weights of %s are written out as %s to %s", path, weights, copy)


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
